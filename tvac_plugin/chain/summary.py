"""Cells that differ in the seed alone taken together, and held against the undefended ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvac_plugin.chain.matching import attack_curve, pool_matched
from tvac_plugin.chain.pairs import Found, control, finished, groups, pairs, without_seed
from tvac_plugin.chain.pooling import difference, over_seeds, pooled
from tvac_plugin.chain.recipe import BASE


def summarise(cells: Sequence[Found], utility: str | None = None) -> list[dict[str, Any]]:
    """Averages cells that differ in the seed alone, and compares them with the undefended ones seed by seed.

    Args:
        cells: As in `results.json`: `params`, `arm` (the keys of the arm), `conditions` (what both sides of a
            comparison share), `defenses`, `skipped` and `attack_cost` by stage, `roles` and `models` by name, and
            `status`; with `utility` also `curves`, `starts` and `matched_utility` by stage.
        utility: Name of the measure that is the user's task.

    Returns:
        One entry per group with `models` and `against_none` by model and measure. Several seeds are asked the same
        prompts and are not pooled as if they were independent: a rate is the mean with `min`, `max` and `num_seeds`, a
        difference that of the differences per seed, and the interval from `low` to `high` is the wider of Student's
        over seeds and the mean one over prompts. With `utility`, `utility_curves` and `matched_utility` by attack.
    """
    everything = groups(cells)
    return [_entry(members, everything, utility) for members in everything]


def _entry(members: Sequence[Found], everything: Sequence[Sequence[Found]], utility: str | None) -> dict[str, Any]:
    ours = finished(members)
    models: dict[str, dict[str, Any]] = {}
    for name, measures in ours[0]["models"].items() if ours else ():
        models[name] = {m: over_seeds([cell["models"][name][m] for cell in ours]) for m in measures}
    theirs = control(members, everything)
    against_none = {} if theirs is None else _against(ours, theirs)
    return {
        "params": without_seed(members[0]["params"]), "arm": [key for key in members[0]["arm"] if key != "seed"],
        "defended": bool(members[0]["defenses"]), "skipped": members[0]["skipped"], "roles": members[0]["roles"],
        "num_cells": len(members), "num_finished": len(ours), "models": models,
        "attack_cost": {
            stage: [cell["attack_cost"][stage] for cell in ours]
            for stage in (ours[0]["attack_cost"] if ours else ())
        },
        "against_none": against_none,
        "utility_curves": _utility_curves(ours, utility) if utility else {},
        "matched_utility": pool_matched(ours, against_none, utility) if utility else {},
    }  # fmt: skip


def _utility_curves(ours: Sequence[Found], utility: str) -> dict[str, list[dict[str, Any]]]:
    """Harm and task at the steps of an attack that all seeds have, by stage."""
    curves: dict[str, list[dict[str, Any]]] = {}
    for stage in ours[0]["curves"] if ours else ():
        runs = [{point.step: point for point in attack_curve(cell, stage, utility)} for cell in ours]
        shared = [[run[step] for run in runs] for step in runs[0] if all(step in run for run in runs)]
        if shared:
            curves[stage] = [
                {"step": points[0].step, "harmful_score": over_seeds([point.harm for point in points]),
                 "utility": over_seeds([point.task for point in points])}
                for points in shared
            ]  # fmt: skip
    return curves


def _against(ours: Sequence[Found], theirs: Sequence[Found]) -> dict[str, Any]:
    """Differences in percentage points, each cell against the one with its seed."""
    both = pairs(ours, theirs)
    differences: dict[str, Any] = {}
    for name, measures in both[0][0]["models"].items() if both else ():
        if name == BASE or both[0][0]["skipped"].get(name) in both[0][0]["models"]:
            continue
        for measure in measures:
            changes = [difference(a["models"][name][measure], b["models"].get(name, {}).get(measure)) for a, b in both]
            comparable = [change for change in changes if change is not None]
            if len(comparable) == len(changes):
                differences.setdefault(name, {})[measure] = pooled(comparable)
    return differences
