"""The cells of a chain: which keys each is run with, and which of them must be alike for a comparison."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from tvac_plugin.chain.recipe import Chain, ChainRecipe
from tvac_plugin.configs import DEFENSE_CONFIGS

Cell = dict[str, Any]
_ALWAYS_ALIKE = ("harmful_ratio", "seed")


def cells(recipe: ChainRecipe) -> Iterator[Cell]:
    """Every arm with every combination of the matrix; keys of arms come first, in an order that all arms share."""
    for arm in recipe.arms or [{}]:
        ordered = {key: arm[key] for key in sorted(arm, key=lambda key: ("." in key, key))}
        for values in itertools.product(*recipe.matrix.values()):
            yield ordered | dict(zip(recipe.matrix, values, strict=True))


def arm_keys(recipe: ChainRecipe, cell: Cell) -> list[str]:
    """The keys of a cell that its arm set, in the cell's order."""
    return [key for key in cell if key not in recipe.matrix]


def conditions(chain: Chain, cell: Cell) -> Cell:
    """What another cell must have too, to be compared with this one: all but the arm and the defense."""
    free = arm_keys(chain.recipe, cell)
    return {
        key: value
        for key, value in cell.items()
        if key in _ALWAYS_ALIKE or not (key in free or _sets_a_defense(key, chain))
    }


def _sets_a_defense(key: str, chain: Chain) -> bool:
    name, _, inner = key.partition(".")
    is_lox = any(name == stage.name and stage.lox is not None for stage in chain.recipe.stages)
    return is_lox or (inner or name).split(".")[0] in ("safety_defense", "custom_defense", *DEFENSE_CONFIGS)
