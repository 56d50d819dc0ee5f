"""Everything a report shows, in one self-describing document."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tvac_plugin.chain.jobs import Job, Plan
from tvac_plugin.chain.recipe import BASE
from tvac_plugin.chain.state import JobState
from tvac_plugin.files import write_json
from tvac_plugin.provenance import TRACE_FILE, versions

RESULTS_FILE = "results.json"
FORMAT = 1
_T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t for a two-sided 95 % interval, by degrees of freedom."""

Measures = dict[str, dict[str, Any]]


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


def summarise(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Averages cells that differ in the seed alone, and compares them with the undefended ones.

    A group with one seed keeps the interval over prompts; with several, the interval is Student's over seeds.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        key = json.dumps({k: v for k, v in cell["params"].items() if k != "seed"}, sort_keys=True)
        groups.setdefault(key, []).append(cell)
    summary = []
    for key, members in groups.items():
        finished = [cell for cell in members if cell["status"] == "finished"]
        models: dict[str, Measures] = {}
        for name in finished[0]["models"] if finished else ():
            measures = finished[0]["models"][name]
            models[name] = {m: _over_seeds([cell["models"][name][m] for cell in finished]) for m in measures}
        summary.append({
            "params": json.loads(key), "num_cells": len(members), "num_finished": len(finished), "models": models,
            "attack_cost": [cell["attack_cost"] for cell in finished],
        })  # fmt: skip
    for entry in summary:
        control = _control(entry, summary)
        entry["against_none"] = {} if control is None else _differences(entry["models"], control["models"])
    return summary


def _over_seeds(rates: list[dict[str, Any]]) -> dict[str, Any]:
    if len(rates) == 1:
        return rates[0] | {"num_seeds": 1}
    values = [rate["percent"] for rate in rates]
    mean, spread = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    half = _T95.get(len(values) - 1, 1.96) * spread
    return rates[0] | {
        "percent": round(mean, 4),
        "low": round(max(0.0, mean - half), 4),
        "high": round(min(100.0, mean + half), 4),
        "num_scored": sum(rate["num_scored"] for rate in rates),
        "num_unscored": sum(rate["num_unscored"] for rate in rates),
        "num_seeds": len(values),
    }


def _control(entry: Mapping[str, Any], summary: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The undefended group with the same other parameters."""
    if entry["params"].get("safety_defense") in (None, "none"):
        return None
    wanted = entry["params"] | {"safety_defense": "none"}
    return next((other for other in summary if other["params"] == wanted and other["models"]), None)


def _differences(ours: Mapping[str, Measures], theirs: Mapping[str, Measures]) -> dict[str, Any]:
    """Differences in percentage points with a 95 % interval (Newcombe's, from the two rates' own intervals)."""
    differences: dict[str, Any] = {}
    for name, measures in ours.items():
        if name == BASE:
            continue
        for measure, a in measures.items():
            b = theirs.get(name, {}).get(measure)
            if b is None or a.get("prompts_sha256") != b.get("prompts_sha256") or a["judge"] != b["judge"]:
                continue
            change = a["percent"] - b["percent"]
            low = change - math.hypot(a["percent"] - a["low"], b["high"] - b["percent"])
            high = change + math.hypot(a["high"] - a["percent"], b["percent"] - b["low"])
            differences.setdefault(name, {})[measure] = {
                "points": round(change, 4), "low": round(low, 4), "high": round(high, 4),
                "within_noise": low <= 0 <= high,
            }  # fmt: skip
    return differences


def _cell(plan: Plan, params: dict[str, Any], ids: Mapping[str, str], states: Mapping[str, JobState]) -> dict[str, Any]:
    problems = [f"{job}: {states[job].error}" for job in ids.values() if states[job].status != "finished"]
    cell: dict[str, Any] = {
        "params": params, "status": "failed" if problems else "finished", "problems": problems,
        "jobs": dict(ids), "models": {}, "curve": [], "attack_cost": None,
        "samples": {},
    }  # fmt: skip
    if problems:
        return cell
    for job_id in ids.values():
        job = plan.jobs[job_id]
        if job.kind == "evaluate":
            evaluation = json.loads((job.output / "evaluation.json").read_text(encoding="utf-8"))
            cell["samples"] |= _samples(job)
            for name, measures in evaluation["models"].items():
                if name.startswith("step "):
                    cell["curve"].append({"step": int(name.removeprefix("step ")), **measures})
                else:
                    cell["models"].setdefault(name, {}).update(measures)
    threshold = plan.chain.recipe.attack_threshold
    reached = [p["step"] for p in cell["curve"] if p.get("harmful_score", {}).get("percent", -1.0) > threshold]
    cell["attack_cost"] = min(reached, default=None)
    return cell


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
        "recipe": job.recipe, "command": list(job.command), "outputs": state.outputs,
        "seconds": state.seconds, "peak_memory_mb": state.peak_memory_mb,
    }  # fmt: skip
    for name in ("safety_defense.json", "simulated_user.json"):
        path = job.output / name
        if state.status == "finished" and path.is_file():
            facts[name.removesuffix(".json")] = json.loads(path.read_text(encoding="utf-8"))
    if state.status == "finished" and job.kind == "train":
        facts["trace"] = _trace(job.output / TRACE_FILE)
        facts["losses"] = _losses(job.output)
    return facts


def _trace(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line["event"] in ("probe", "draw")]


def _losses(output: Path) -> list[tuple[int, float]]:
    """Steps with their training loss, from the last checkpoint's log or from the trace."""
    checkpoints = sorted(output.glob("checkpoint-*"), key=lambda p: int(p.name.removeprefix("checkpoint-")))
    if checkpoints and (checkpoints[-1] / "trainer_state.json").is_file():
        log = json.loads((checkpoints[-1] / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        return [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    if not (output / TRACE_FILE).is_file():
        return []
    lines = (json.loads(line) for line in (output / TRACE_FILE).read_text(encoding="utf-8").splitlines())
    return [(line["step"], line["safety/perturbed_loss"]) for line in lines if line["event"] == "step"]


def _hardware() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"machine": platform.machine(), "cores": os.cpu_count(), "gpus": gpus, "python": platform.python_version()}
