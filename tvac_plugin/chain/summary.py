"""Cells that differ in the seed alone taken together, and held against the undefended ones."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tvac_plugin.chain.recipe import BASE

_T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t for a two-sided 95 % interval, by degrees of freedom."""

Measures = Mapping[str, Mapping[str, Any]]
Found = Mapping[str, Any]


def summarise(cells: Sequence[Found]) -> list[dict[str, Any]]:
    """Averages cells that differ in the seed alone, and compares them with the undefended ones seed by seed.

    Args:
        cells: As in `results.json`: `params`, `arm` (the keys of the arm), `conditions` (what both sides of a
            comparison share), `defenses` and `skipped` by stage, `status`, `models` and `attack_cost`.

    Returns:
        One entry per group with `models` and `against_none` by model and measure. Several seeds are asked the same
        prompts and are not pooled as if they were independent: a rate is the mean with `min`, `max` and `num_seeds`, a
        difference that of the differences per seed, and the interval from `low` to `high` is the wider of Student's
        over seeds and the mean one over prompts.
    """
    groups: dict[str, list[Found]] = {}
    for cell in cells:
        key = json.dumps(_without_seed(cell["params"]), sort_keys=True)
        groups.setdefault(key, []).append(cell)
    return [_entry(members, list(groups.values())) for members in groups.values()]


def _entry(members: Sequence[Found], groups: Sequence[Sequence[Found]]) -> dict[str, Any]:
    finished = _finished(members)
    models: dict[str, dict[str, Any]] = {}
    for name, measures in finished[0]["models"].items() if finished else ():
        models[name] = {m: _over_seeds([cell["models"][name][m] for cell in finished]) for m in measures}
    control = _control(members, groups)
    return {
        "params": _without_seed(members[0]["params"]), "arm": [key for key in members[0]["arm"] if key != "seed"],
        "skipped": members[0]["skipped"], "num_cells": len(members), "num_finished": len(finished), "models": models,
        "attack_cost": [cell["attack_cost"] for cell in finished],
        "against_none": {} if control is None else _against(finished, control),
    }  # fmt: skip


def _without_seed(params: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in params.items() if key != "seed"}


def _finished(members: Sequence[Found]) -> list[Found]:
    return [cell for cell in members if cell["status"] == "finished"]


def _over_seeds(rates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if len(rates) == 1:
        return {**rates[0], "num_seeds": 1}
    spread = _spread([rate["percent"] for rate in rates], [(rate["low"], rate["high"]) for rate in rates])
    return {
        **rates[0], "percent": spread.pop("mean"), **spread,
        "low": max(0.0, spread["low"]), "high": min(100.0, spread["high"]),
        "num_scored": sum(rate["num_scored"] for rate in rates),
        "num_unscored": sum(rate["num_unscored"] for rate in rates),
        "num_seeds": len(rates),
    }  # fmt: skip


def _spread(values: Sequence[float], intervals: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Mean, extremes and interval of one number per seed."""
    mean = statistics.fmean(values)
    half = _T95.get(len(values) - 1, 1.96) * statistics.stdev(values) / math.sqrt(len(values))
    found = {
        "mean": mean, "min": min(values), "max": max(values),
        "low": min(mean - half, statistics.fmean(low for low, _ in intervals)),
        "high": max(mean + half, statistics.fmean(high for _, high in intervals)),
    }  # fmt: skip
    return {name: round(value, 4) for name, value in found.items()}


def _control(members: Sequence[Found], groups: Sequence[Sequence[Found]]) -> list[Found] | None:
    """The finished cells of the undefended group under the same conditions, and with the most keys in common."""
    ours = members[0]
    if not ours["defenses"]:
        return None
    candidates = [
        finished
        for finished in map(_finished, groups)
        if finished
        and not finished[0]["defenses"]
        and _without_seed(finished[0]["conditions"]) == _without_seed(ours["conditions"])
    ]
    return max(candidates, key=lambda group: _num_shared(group[0]["params"], ours["params"]), default=None)


def _num_shared(params: Mapping[str, Any], others: Mapping[str, Any]) -> int:
    return sum(key in others and others[key] == value for key, value in params.items())


def _against(ours: Sequence[Found], theirs: Sequence[Found]) -> dict[str, Any]:
    """Differences in percentage points, each cell against the one with its seed."""
    by_seed = {cell["params"].get("seed"): cell for cell in theirs}
    pairs = [(cell, by_seed[seed]) for cell in ours if (seed := cell["params"].get("seed")) in by_seed]
    differences: dict[str, Any] = {}
    for name, measures in pairs[0][0]["models"].items() if pairs else ():
        if name == BASE or pairs[0][0]["skipped"].get(name) in pairs[0][0]["models"]:
            continue
        for measure in measures:
            changes = [_change(a["models"][name][measure], b["models"].get(name, {}).get(measure)) for a, b in pairs]
            comparable = [change for change in changes if change is not None]
            if len(comparable) == len(changes):
                differences.setdefault(name, {})[measure] = _pooled(comparable)
    return differences


def _change(a: Mapping[str, Any], b: Mapping[str, Any] | None) -> dict[str, float] | None:
    """The difference of two rates with a 95 % interval (Newcombe's, from their own intervals)."""
    if b is None or a.get("prompts_sha256") != b.get("prompts_sha256") or a["judge"] != b["judge"]:
        return None
    points = a["percent"] - b["percent"]
    low = points - math.hypot(a["percent"] - a["low"], b["high"] - b["percent"])
    high = points + math.hypot(a["high"] - a["percent"], b["percent"] - b["low"])
    return {"points": round(points, 4), "low": round(low, 4), "high": round(high, 4)}


def _pooled(changes: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    pooled: dict[str, Any] = dict(changes[0])
    if len(changes) > 1:
        spread = _spread([change["points"] for change in changes], [(c["low"], c["high"]) for c in changes])
        pooled = {
            "points": spread.pop("mean"), **spread, "num_seeds": len(changes),
            "low": max(-100.0, spread["low"]), "high": min(100.0, spread["high"]),
        }  # fmt: skip
    return pooled | {"within_noise": pooled["low"] <= 0 <= pooled["high"]}
