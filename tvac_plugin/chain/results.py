"""Everything a report shows, in one self-describing document."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.boundary.files import checkpoints, write_json
from tvac_plugin.boundary.secrets import without_secrets
from tvac_plugin.chain.cells import Cell, arm_keys, conditions
from tvac_plugin.chain.jobs import ChainPlan, Job, is_defended
from tvac_plugin.chain.matching import matched_utility
from tvac_plugin.chain.recipe import BASE, DEFAULT_UTILITY
from tvac_plugin.chain.state import JobState
from tvac_plugin.chain.summary import summarise
from tvac_plugin.provenance.run_identity import versions
from tvac_plugin.provenance.settling import settling
from tvac_plugin.provenance.trace import TRACE_FILE
from tvac_plugin.report.pages import FORMAT, RESULTS_FILE


def collect(plan: ChainPlan, states: Mapping[str, JobState], found: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Gathers the results of a chain and writes them to its `results.json`.

    Everything but `jobs.*.seconds` and `jobs.*.peak_memory_mb` is the same whenever the chain is run again.

    Args:
        plan: What was run.
        states: How each of its jobs ended.
        found: What its `search:` and its `attacker:` came to, by these names, where it has them.
    """
    results = gather(plan, states) | dict(found or {})
    write_json(plan.root / RESULTS_FILE, results)
    return results


def gather(plan: ChainPlan, states: Mapping[str, JobState]) -> dict[str, Any]:
    """The results of a chain, which are written nowhere."""
    utility = plan.chain.recipe.utility or DEFAULT_UTILITY
    cells = [_cell(plan, params, ids, states) for params, ids in plan.cells]
    for cell, readings in zip(cells, matched_utility(cells, utility), strict=True):
        cell["matched_utility"] = readings
    return {
        "format": FORMAT,
        "asked": plan.chain.recipe.model_dump(),
        "versions": versions(),
        "hardware": _hardware(),
        "utility": utility,
        "cells": cells,
        "summary": summarise(cells, utility),
        "jobs": {job.id: _job(job, states[job.id]) for job in plan.jobs.values()},
    }


def _cell(plan: ChainPlan, params: Cell, ids: Mapping[str, str], states: Mapping[str, JobState]) -> dict[str, Any]:
    problems = [
        f"{job}: {states[job].error}" for job in dict.fromkeys(ids.values()) if states[job].status != "finished"
    ]
    cell: dict[str, Any] = {
        "params": params, "arm": arm_keys(plan.chain.recipe, params), "conditions": conditions(plan.chain, params),
        "defenses": defenses_of(plan, ids), "skipped": _skipped(plan, ids), "roles": _roles(plan, ids),
        "status": "failed" if problems else "finished", "problems": problems,
        "jobs": dict(ids), "models": {}, "curves": {}, "starts": {}, "attack_cost": {}, "samples": {},
    }  # fmt: skip
    if problems:
        return cell
    for name, job_id in ids.items():
        if plan.jobs[job_id].kind == "evaluate":
            _add_evaluation(cell, plan.jobs[job_id], shown_as=name.partition(".")[2])
    cell["starts"] = _starts(plan, ids, cell)
    threshold = plan.chain.recipe.attack_threshold
    cell["attack_cost"] = {stage: _attack_cost(curve, threshold) for stage, curve in cell["curves"].items()}
    return cell


def _attack_cost(curve: Sequence[Mapping[str, Any]], threshold: float) -> int | None:
    """The first step whose harmful score is above the threshold, percent."""
    reached = [p["step"] for p in curve if p.get("harmful_score", {}).get("percent", -1.0) > threshold]
    return min(reached, default=None)


def _starts(plan: ChainPlan, ids: Mapping[str, str], cell: Mapping[str, Any]) -> dict[str, str]:
    """The model that an attack starts from, where it was evaluated under some name."""
    first = next(stage.name for stage in plan.chain.recipe.stages if stage.train is not None)
    starts: dict[str, str] = {}
    for attack in (name for name, role in cell["roles"].items() if role == "attacked" and name not in cell["skipped"]):
        source = plan.chain.stage(attack).model_from
        names = [name for name in cell["models"] if name != BASE and source is not None and ids[name] == ids[source]]
        if source is None and BASE in cell["models"]:
            names = [BASE] if _base_model(plan, ids[attack]) == _base_model(plan, ids[first]) else []
        if names:
            starts[attack] = names[0]
    return starts


def _base_model(plan: ChainPlan, job_id: str) -> str:
    return str(plan.jobs[job_id].recipe["base_model"])


def defenses_of(plan: ChainPlan, ids: Mapping[str, str]) -> dict[str, str]:
    """What defends the models of a cell, by stage."""
    jobs = [plan.jobs[job_id] for job_id in ids.values()]
    trained = {
        job.stage: job.recipe["safety_defense"] for job in jobs if job.kind == "train" and is_defended(job.recipe)
    }
    return trained | {job.stage: "lox" for job in jobs if job.kind == "lox"}


def _roles(plan: ChainPlan, ids: Mapping[str, str]) -> dict[str, str]:
    """What each model of a cell is, by name; what is made of an attacked model by extrapolation is attacked too."""
    trained = {stage: plan.training(plan.jobs[job_id]) for stage, job_id in ids.items() if "." not in stage}
    attacks = {stage for stage, job in trained.items() if "simulated_user" in job.recipe}
    return {BASE: "base"} | {stage: "attacked" if stage in attacks else "aligned" for stage in trained}


def _skipped(plan: ChainPlan, ids: Mapping[str, str]) -> dict[str, str]:
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
            _add_point(cell["curves"].setdefault(shown_as, []), int(name.removeprefix("step ")), measures)


def _add_point(curve: list[dict[str, Any]], step: int, measures: Mapping[str, Any]) -> None:
    """Adds what was measured at a step to what another evaluation measured there."""
    known = next((point for point in curve if point["step"] == step), None)
    if known is None:
        curve.append({"step": step, **measures})
    else:
        known.update(measures)


def _samples(job: Job, *, count: int = 5) -> dict[str, list[dict[str, Any]]]:
    """The first answers to harmful prompts, by model."""
    samples = {}
    for path in sorted((job.output / "answers").glob("*.harmful_score.jsonl")):
        model = path.name.removesuffix(".harmful_score.jsonl")
        if not model.startswith("step "):
            samples[model] = [
                {key: value for key, value in row.items() if key in ("prompt", "answer", "harmful")}
                for row in _lines(path)[:count]
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
        if "simulated_user" not in job.recipe:  # an attack ends where its recipe ends
            facts |= settling(_training_log(job.output)).facts()
    return facts


def _trace(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [line for line in _lines(path) if line["event"] in ("probe", "draw")]


def training_losses(output: Path) -> list[tuple[int, float]]:
    """Steps with their training loss, from the last checkpoint's log or from the trace."""
    return [(entry["step"], entry["loss"]) for entry in _training_log(output)]


def _training_log(output: Path) -> list[dict[str, Any]]:
    states = [folder / "trainer_state.json" for folder in checkpoints(output).values()]
    if states and states[-1].is_file():
        with _whole(states[-1]):
            log = json.loads(states[-1].read_text(encoding="utf-8"))["log_history"]
        return [entry for entry in log if "loss" in entry]
    if not (output / TRACE_FILE).is_file():
        return []
    return [line for line in _lines(output / TRACE_FILE) if line["event"] == "step"]


def _lines(path: Path) -> list[dict[str, Any]]:
    with _whole(path):
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Names a record that is no JSON: one of a job that ended before records were hashed, or damaged since."""
    try:
        yield
    except ValueError as error:
        raise UserError(
            f"{path}: cut short or damaged. Delete this job's folder below `jobs/` and run the same command again."
        ) from error


def _hardware() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"machine": platform.machine(), "cores": os.cpu_count(), "gpus": gpus, "python": platform.python_version()}
