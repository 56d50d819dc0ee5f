"""What all blocks of a recipe share, and how a defense says which data it reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tvac_plugin.messages import shown

Stage = Literal["alignment", "fine_tuning"]
Site = Literal["attention", "mlp", "layer"]
RhoScope = Literal["batch", "sample"]

Steps = Annotated[int, Field(ge=1, le=10_000_000)]
Rows = Annotated[int, Field(ge=1, le=100_000)]
Scale = Annotated[float, Field(ge=0, le=10_000)]
Share = Annotated[float, Field(gt=0, le=1)]
Entries = Annotated[list[dict[str, Any]], Field(min_length=1)]

DATA_KEYS: dict[str, str] = {
    "harmful_datasets": "harmful prompts with harmful answers, which the model is never trained to give",
    "refusal_datasets": "refusals of the very prompts of `harmful_datasets`, paired by prompt",
    "retain_datasets": "benign prompts with answers, whose quality is to be kept",
    "alignment_datasets": "harmful prompts with refusals, as alignment used them",
}
"""Data sets that defenses read beside `datasets:`, by their key in a recipe."""


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Returns " Did you mean `x`?" for the option that `word` resembles, or the list of all options."""
    names = list(options)
    match = get_close_matches(word.lower().replace("-", "_"), names, n=1, cutoff=0.6)
    return f" Did you mean `{match[0]}`?" if match else f" Use one of: {', '.join(names)}."


def example_entry(key: str) -> str:
    """A line for `key` that could be pasted into a recipe."""
    return f"{key}: [{{path: {key.removesuffix('_datasets')}.jsonl, type: alpaca}}]"


class Block(BaseModel):
    """Base of the blocks that this plugin adds to a recipe; unknown keys and loose types are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    block: ClassVar[str]
    """The key of the block, or what to call it in an error."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for key in values:
                if key not in cls.model_fields:
                    written = shown(key).strip("'")
                    raise ValueError(f"{cls.block}: unknown key `{written}`.{did_you_mean(written, cls.model_fields)}")
        return values


class Stream(NamedTuple):
    """Rows that a defense reads beside the training batches.

    Attributes:
        key: Where the recipe names them, one of `DATA_KEYS`.
        batch_size: Rows of one batch, on each process.
        pairs_with: A second key, whose rows are matched to the first one's by prompt.
        limit: Only the first so many rows are used; `None` for all.
        share: The part of the rows this stream may use, as a range within 0 to 1.
        optional: Whether the defense can do without.
    """

    key: str
    batch_size: int
    pairs_with: str | None = None
    limit: int | None = None
    share: tuple[float, float] = (0.0, 1.0)
    optional: bool = False


class DefenseConfig(Block):
    """Base of the settings of one defense.

    For the defenses of this package, `block` is the value of `safety_defense:` and the key of the settings. A defense
    of your own is named by its import path, and its settings are under `custom_defense:`.
    """

    block: ClassVar[str] = "custom_defense"
    stage: ClassVar[Stage] = "alignment"
    """Whether it defends while a model is aligned, or while a user fine-tunes an aligned one."""

    def streams(self) -> Mapping[str, Stream]:
        """The data it reads beside the training batches, by the name under which it asks for them."""
        return {}

    def data_keys(self) -> dict[str, bool]:
        """The keys of a recipe that `streams` reads, and whether each is required."""
        keys: dict[str, bool] = {}
        for stream in self.streams().values():
            for key in filter(None, (stream.key, stream.pairs_with)):
                keys[key] = keys.get(key, False) or not stream.optional
        return keys

    def row_limit(self, key: str) -> int | None:
        """How many rows under `key` are read at most, the first ones; `None` for all."""
        limits = [stream.limit for stream in self.streams().values() if key in (stream.key, stream.pairs_with)]
        known = [limit for limit in limits if limit is not None]
        return max(known) if known and len(known) == len(limits) else None


PERTURB = (
    "Whose output is pushed: `attention` (before the residual addition; published code), `mlp` or the whole `layer`. "
    "Default attention."
)
RHO_SCOPE = (
    "What `rho` bounds: `batch`, the whole micro-batch tensor (published code: the budget of one sample shrinks as "
    "the batch grows), or `sample`, every sample alone. With packing a sample is one packed row. Default batch."
)
PERTURBED_SHARE = (
    "Share of a micro-batch's rows that are perturbed, the first ones, rounded up; the first pass reads no others, "
    "which makes a step cheaper and the defense weaker. With packing a micro-batch of one row is perturbed whole. "
    "Default 1, the paper's method."
)
