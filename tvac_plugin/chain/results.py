"""Everything a report shows, in one self-describing document."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tvac_plugin.chain.cells import Cell, arm_keys, conditions
from tvac_plugin.chain.jobs import Job, Plan, is_defended
from tvac_plugin.chain.state import JobState
from tvac_plugin.chain.summary import summarise
from tvac_plugin.files import checkpoints, write_json
from tvac_plugin.provenance import TRACE_FILE, versions
from tvac_plugin.secrecy import without_secrets

RESULTS_FILE = "results.json"
FORMAT = 1


def collect(plan: Plan, states: Mapping[str, JobState]) -> dict[str, Any]:
    """Gathers the results of a chain and writes them to its `results.json`.

    Everything but `jobs.*.seconds` and `jobs.*.peak_memory_mb` is the same whenever the chain is run again.
    """
    cells = [_cell(plan, params, ids, states) for params, ids in plan.cells]
    results = {
        "format": FORMAT,
        "asked": plan.chain.recipe.model_dump(),
        "versions": versions(),
        "hardware": _hardware(),
        "cells": cells,
        "summary": summarise(cells),
        "jobs": {job.id: _job(job, states[job.id]) for job in plan.jobs.values()},
    }
    write_json(plan.root / RESULTS_FILE, results)
    return results


def _cell(plan: Plan, params: Cell, ids: Mapping[str, str], states: Mapping[str, JobState]) -> dict[str, Any]:
    problems = [
        f"{job}: {states[job].error}" for job in dict.fromkeys(ids.values()) if states[job].status != "finished"
    ]
    cell: dict[str, Any] = {
        "params": params, "arm": arm_keys(plan.chain.recipe, params), "conditions": conditions(plan.chain, params),
        "defenses": _defenses(plan, ids), "skipped": _skipped(plan, ids),
        "status": "failed" if problems else "finished", "problems": problems,
        "jobs": dict(ids), "models": {}, "curve": [], "attack_cost": None, "samples": {},
    }  # fmt: skip
    if problems:
        return cell
    for name, job_id in ids.items():
        if plan.jobs[job_id].kind == "evaluate":
            _add_evaluation(cell, plan.jobs[job_id], shown_as=name.partition(".")[2])
    threshold = plan.chain.recipe.attack_threshold
    reached = [p["step"] for p in cell["curve"] if p.get("harmful_score", {}).get("percent", -1.0) > threshold]
    cell["attack_cost"] = min(reached, default=None)
    return cell


def _defenses(plan: Plan, ids: Mapping[str, str]) -> dict[str, str]:
    """What defends the models of a cell, by stage."""
    jobs = [plan.jobs[job_id] for job_id in ids.values()]
    trained = {
        job.stage: job.recipe["safety_defense"] for job in jobs if job.kind == "train" and is_defended(job.recipe)
    }
    return trained | {job.stage: "lox" for job in jobs if job.kind == "lox"}


def _skipped(plan: Plan, ids: Mapping[str, str]) -> dict[str, str]:
    """Stages that this cell skips, with the stage whose model stands in."""
    made = {stage: plan.jobs[job_id].stage for stage, job_id in ids.items() if "." not in stage}
    return {stage: other for stage, other in made.items() if stage != other}


def _add_evaluation(cell: dict[str, Any], job: Job, *, shown_as: str) -> None:
    evaluation = json.loads((job.output / "evaluation.json").read_text(encoding="utf-8"))
    cell["samples"] |= {shown_as if name == job.subject else name: rows for name, rows in _samples(job).items()}
    for name, measures in evaluation["models"].items():
        if not name.startswith("step "):
            cell["models"].setdefault(shown_as if name == job.subject else name, {}).update(measures)
        elif shown_as not in cell["skipped"]:
            cell["curve"].append({"step": int(name.removeprefix("step ")), **measures})


def _samples(job: Job, *, count: int = 5) -> dict[str, list[dict[str, Any]]]:
    """The first answers to harmful prompts, by model."""
    samples = {}
    for path in sorted((job.output / "answers").glob("*.harmful_score.jsonl")):
        model = path.name.removesuffix(".harmful_score.jsonl")
        if not model.startswith("step "):
            lines = path.read_text(encoding="utf-8").splitlines()[:count]
            samples[model] = [
                {key: value for key, value in json.loads(line).items() if key in ("prompt", "answer", "harmful")}
                for line in lines
            ]
    return samples


def _job(job: Job, state: JobState) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "kind": job.kind, "stage": job.stage, "status": state.status, "error": state.error,
        "recipe": without_secrets(job.recipe), "command": list(job.command), "outputs": state.outputs,
        "seconds": state.seconds, "peak_memory_mb": state.peak_memory_mb,
    }  # fmt: skip
    for name in ("safety_defense.json", "simulated_user.json"):
        path = job.output / name
        if state.status == "finished" and path.is_file():
            facts[name.removesuffix(".json")] = json.loads(path.read_text(encoding="utf-8"))
    if state.status == "finished" and job.kind == "train":
        facts["trace"] = _trace(job.output / TRACE_FILE)
        facts["losses"] = training_losses(job.output)
    return facts


def _trace(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line["event"] in ("probe", "draw")]


def training_losses(output: Path) -> list[tuple[int, float]]:
    """Steps with their training loss, from the last checkpoint's log or from the trace."""
    states = [folder / "trainer_state.json" for folder in checkpoints(output).values()]
    if states and states[-1].is_file():
        log = json.loads(states[-1].read_text(encoding="utf-8"))["log_history"]
        return [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    if not (output / TRACE_FILE).is_file():
        return []
    lines = (json.loads(line) for line in (output / TRACE_FILE).read_text(encoding="utf-8").splitlines())
    return [(line["step"], line["loss"]) for line in lines if line["event"] == "step"]


def _hardware() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"machine": platform.machine(), "cores": os.cpu_count(), "gpus": gpus, "python": platform.python_version()}
