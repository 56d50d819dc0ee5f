"""Which settings to change when a recipe does not fit, cheapest first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tvac_plugin.configs.base import DefenseConfig

_SHORTEST = 128


def remedies(recipe: Mapping[str, Any], config: DefenseConfig | None) -> Iterator[dict[str, Any]]:
    """Yields changes of the recipe, each with all of the earlier ones that it does not replace.

    First those that change no result (checkpointing), then 4-bit weights, then smaller micro-batches with as many rows
    a step (where `rho` bounds the micro-batch, a row's share of it grows), then shorter rows.
    """
    is_checkpointed = bool(recipe.get("gradient_checkpointing"))
    if not is_checkpointed and (own := _own_changes(recipe, config, checkpointed=False)):
        yield own
    changes: dict[str, Any] = {}
    if not is_checkpointed:
        changes |= {"gradient_checkpointing": True, **_own_changes(recipe, config, checkpointed=True)}
        yield dict(changes)
    if recipe.get("adapter") == "lora":
        changes |= {"adapter": "qlora", "load_in_4bit": True}
        yield dict(changes)
    yield from _smaller(recipe, changes)


def _own_changes(recipe: Mapping[str, Any], config: DefenseConfig | None, *, checkpointed: bool) -> dict[str, Any]:
    """What the defense knows to need less memory, in its block."""
    less = {} if config is None else config.less_memory(checkpointed=checkpointed)
    return {config.block: {**(recipe.get(config.block) or {}), **less}} if config is not None and less else {}


def _smaller(recipe: Mapping[str, Any], changes: dict[str, Any]) -> Iterator[dict[str, Any]]:
    rows, accumulation = recipe.get("micro_batch_size") or 1, recipe.get("gradient_accumulation_steps") or 1
    while rows % 2 == 0:
        rows, accumulation = rows // 2, accumulation * 2
        changes |= {"micro_batch_size": rows, "gradient_accumulation_steps": accumulation}
        yield dict(changes)
    length = recipe.get("sequence_len") or 512
    while length // 2 >= _SHORTEST:
        length //= 2
        changes["sequence_len"] = length
        yield dict(changes)
