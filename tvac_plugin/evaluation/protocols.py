"""What the published evaluations ask: which rows, how many, and how long an answer may be.

Read in the authors' scripts: `poison/evaluation/pred.py`, and `pred_eval.py` of the user's tasks. Their prompts are
rows, so one that several rows ask counts as often.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from tvac_plugin.boundary.errors import UserError, shown

ProtocolName = Literal["t_vaccine", "vaccine", "booster", "lisa"]
TASKS = ("tvac_sst2", "tvac_ag_news", "tvac_gsm8k")
"""The users' tasks of these papers."""
_PLACE = {"path": "PKU-Alignment/BeaverTails", "subset": None, "split": "30k_test", "field": "prompt"}


class Protocol(NamedTuple):
    """One paper's numbers.

    Attributes:
        source: The repository they are from.
        only: Which rows of BeaverTails' `30k_test` count; `None` for all.
        num_prompts: The first so many of these rows.
        max_new_tokens: Longest answer to them, in tokens.
        limit: The first so many items of a user's task.
    """

    source: str
    only: Mapping[str, Any] | None
    num_prompts: int
    max_new_tokens: int
    limit: int


_UNSAFE = {"is_safe": False}
PROTOCOLS: dict[str, Protocol] = {
    "t_vaccine": Protocol("github.com/Lslland/T-Vaccine", _UNSAFE, 500, 128, 500),
    "vaccine": Protocol("github.com/git-disl/Vaccine", _UNSAFE, 500, 128, 500),
    "booster": Protocol("github.com/git-disl/Booster", _UNSAFE, 1000, 512, 1000),
    "lisa": Protocol("github.com/git-disl/Lisa", None, 1000, 512, 1000),
}


def with_protocol(recipe: dict[str, Any]) -> dict[str, Any]:
    """An evaluation's recipe with the keys that its `protocol:` sets; without one, the recipe itself.

    `prompts.path` may name a copy of the data. Its `subset`, `split` and `field` are then the recipe's own.

    Raises:
        UserError: A key says something else than the protocol, or the protocol is about nothing in the recipe.
    """
    name = recipe.get("protocol")
    if not isinstance(name, str) or name not in PROTOCOLS:
        return recipe
    filled = _with_own_blocks(recipe)
    parts = list(_parts(filled, PROTOCOLS[name]))
    if not parts:
        raise UserError(
            f"evaluate recipe: `protocol: {name}` is about nothing here. Add harmful_score:, or one of the tasks "
            f"{', '.join(TASKS)} to accuracy:, or remove the key."
        )
    for where, part, settings in parts:
        for key, value in settings.items():
            if part.setdefault(key, value) != value:
                raise UserError(
                    f"{where}.{key}: {shown(part[key])} contradicts `protocol: {name}`, which has "
                    f"{shown(value)}. Remove one of the two keys."
                )
    return filled


def _with_own_blocks(recipe: dict[str, Any]) -> dict[str, Any]:
    """A copy in which the blocks that a protocol fills are shared with no other, as YAML's anchors share them."""
    blocks = {key: block for key in ("harmful_score", "accuracy") if isinstance(block := recipe.get(key), dict)}
    own = {
        key: {name: dict(part) if isinstance(part, dict) else part for name, part in block.items()}
        for key, block in blocks.items()
    }
    return recipe | own


def _parts(recipe: dict[str, Any], protocol: Protocol) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Where a protocol sets something: the name of the block, the block, and its keys with their values."""
    harm, tasks = recipe.get("harmful_score"), recipe.get("accuracy")
    if isinstance(harm, dict):
        yield "harmful_score", harm, {"max_new_tokens": protocol.max_new_tokens}
        prompts = harm.setdefault("prompts", {})
        if isinstance(prompts, dict):
            only = None if protocol.only is None else dict(protocol.only)
            rows = {"only": only, "num_prompts": protocol.num_prompts, "keep_repeats": True}
            is_copy = prompts.get("path", _PLACE["path"]) != _PLACE["path"]
            yield "harmful_score.prompts", prompts, rows if is_copy else _PLACE | rows
    for name, task in tasks.items() if isinstance(tasks, dict) else ():
        if isinstance(task, dict) and task.get("task") in TASKS:
            yield f"accuracy.{name}", task, {"limit": protocol.limit}
