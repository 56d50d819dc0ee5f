"""Which cells are taken together, and which undefended ones they are held against."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Found = Mapping[str, Any]
"""A cell as in `results.json`."""


def groups(cells: Sequence[Found]) -> list[list[Found]]:
    """The cells that differ in the seed alone, together; in the order of the first of each."""
    found: dict[str, list[Found]] = {}
    for cell in cells:
        found.setdefault(json.dumps(without_seed(cell["params"]), sort_keys=True), []).append(cell)
    return list(found.values())


def without_seed(params: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a cell or conditions but the seed."""
    return {key: value for key, value in params.items() if key != "seed"}


def finished(members: Sequence[Found]) -> list[Found]:
    """The cells of a group whose jobs all finished."""
    return [cell for cell in members if cell["status"] == "finished"]


def control(members: Sequence[Found], all_groups: Sequence[Sequence[Found]]) -> list[Found] | None:
    """The finished cells of the undefended group under the same conditions, and with the most keys in common."""
    ours = members[0]
    if not ours["defenses"]:
        return None
    candidates = [
        group
        for group in map(finished, all_groups)
        if group
        and not group[0]["defenses"]
        and without_seed(group[0]["conditions"]) == without_seed(ours["conditions"])
    ]
    return max(candidates, key=lambda group: _num_shared(group[0]["params"], ours["params"]), default=None)


def _num_shared(params: Mapping[str, Any], others: Mapping[str, Any]) -> int:
    return sum(key in others and others[key] == value for key, value in params.items())


def pairs(ours: Sequence[Found], theirs: Sequence[Found]) -> list[tuple[Found, Found]]:
    """Each cell with the one of the other group that has its seed; those without one are left out."""
    by_seed = {cell["params"].get("seed"): cell for cell in theirs}
    return [(cell, by_seed[seed]) for cell in ours if (seed := cell["params"].get("seed")) in by_seed]
