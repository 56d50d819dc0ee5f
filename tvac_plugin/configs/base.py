"""What all blocks of a recipe share, and how a defense says which data it reads."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tvac_plugin.boundary.errors import UserError, did_you_mean, shown

TrainingStage = Literal["alignment", "fine_tuning"]
Site = Literal["attention", "mlp", "layer"]
RhoScope = Literal["batch", "sample"]
RhoScale = Literal["absolute", "relative"]

Steps = Annotated[int, Field(ge=1, le=10_000_000)]
NumRows = Annotated[int, Field(ge=1, le=100_000)]
Scale = Annotated[float, Field(ge=0, le=10_000)]
Share = Annotated[float, Field(gt=0, le=1)]
Entries = Annotated[list[dict[str, Any]], Field(min_length=1)]

DATA_KEYS: dict[str, str] = {
    "harmful_datasets": "harmful prompts with harmful answers, which the model is never trained to give",
    "refusal_datasets": "refusals of the same prompts as in `harmful_datasets`, paired by prompt",
    "retain_datasets": "benign prompts with answers, which stand for all that the model can do",
    "alignment_datasets": "harmful prompts with refusals, as used in alignment",
}
"""Data sets that defenses read beside `datasets:`, by their key in a recipe."""


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
                    raise UserError(f"{cls.block}: unknown key `{written}`.{did_you_mean(written, cls.model_fields)}")
        return values


LEAST = 0.001
"""Least strength of a defense: below it rounding takes away what it adds, or next to all of it."""


def too_weak(block: str, **strengths: float) -> list[str]:
    """One sentence if all of the named strengths of a block are below `LEAST`."""
    if not strengths or any(strength >= LEAST for strength in strengths.values()):
        return []
    named = " and ".join(f"{block}.{key}: {strength:g}" for key, strength in strengths.items())
    one = "it" if len(strengths) == 1 else "one of them"
    return [f"{named}: nothing would be defended. Set {one} to {LEAST} or more."]


def too_weak_together(block: str, **strengths: float) -> list[str]:
    """One sentence if the product of the named strengths of a block, which scales what it adds, is below `LEAST`."""
    if prod(strengths.values()) >= LEAST:
        return []
    named = " times ".join(f"{block}.{key}: {strength:g}" for key, strength in strengths.items())
    return [f"{named}: nothing would be defended. Raise them until the product is {LEAST} or more."]


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
    stage: ClassVar[TrainingStage] = "alignment"
    """Whether it defends while a model is aligned, or while a user fine-tunes an aligned one."""
    strengths: ClassVar[tuple[str, ...]] = ()
    """Settings one of which must be at least `LEAST`."""
    draws_layers: ClassVar[bool] = False
    """Whether it draws layers, so that one step costs more than another."""
    needs_adapter: ClassVar[bool] = False
    """Whether it compares the model with its adapter and without it."""

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

    def model_problems(self, num_layers: int) -> list[str]:
        """Says why these settings do not fit a decoder of `num_layers` layers; empty where they do."""
        return []

    def effect_problems(self) -> list[str]:
        """Says why these settings defend nothing, as strengths of 0 do; empty where they do."""
        return too_weak(self.block, **{name: getattr(self, name) for name in self.strengths})

    def with_tokenizer(self, tokenizer: Any) -> Self:
        """These settings with ids in place of tokens that they name by their text.

        Args:
            tokenizer: The model's; `None` where the trainer has none.

        Raises:
            UserError: A text is not what the setting asks for.
        """
        return self

    def advice(self, keys: Collection[str]) -> list[str]:
        """Says what else would make these settings what their paper tested; empty where nothing would.

        Args:
            keys: Those of `DATA_KEYS` that the recipe has.
        """
        return []

    def less_memory(self, *, checkpointed: bool) -> dict[str, Any]:
        """Changes of these settings that need less memory and change no result.

        Args:
            checkpointed: Whether all layers are checkpointed already.
        """
        return {}

    @classmethod
    def for_benchmark(cls, *, rows: int, layers: int) -> dict[str, Any]:
        """Settings with which one step stands for all: `rows` in every batch, and `layers` drawn, if it draws any."""
        return {"batch_size": rows} if "batch_size" in cls.model_fields else {}

    def row_limit(self, key: str) -> int | None:
        """How many rows under `key` are read at most, the first ones; `None` for all."""
        limits = [stream.limit for stream in self.streams().values() if key in (stream.key, stream.pairs_with)]
        known = [limit for limit in limits if limit is not None]
        return max(known) if known and len(known) == len(limits) else None


PERTURB = (
    "Whose output is perturbed: `attention` (before the residual addition; published code), `mlp` or the whole "
    "`layer`. Default attention."
)
RHO_SCOPE = (
    "What `rho` bounds: `batch`, the whole micro-batch tensor (published code: the budget of one sample shrinks as "
    "the batch grows), or `sample`, each sample separately. With packing, a sample is one packed row. Default batch."
)
RHO_SCALE = (
    "What `rho` measures: `absolute`, the L2 norm of the perturbation (paper), whatever it is added to; `relative`, "
    "its share of what it is added to: the perturbations of the layers, each divided by the norm of its layer's output "
    "without padding, have the joint norm `rho`. It does not depend on the scale of the outputs, and `rho` has no "
    "default then. Default absolute."
)
PERTURBED_SHARE = (
    "Share of a micro-batch's rows that are perturbed: the first rows, rounded up. The first pass reads only these, "
    "which makes a step cheaper and the defense weaker. With packing, a micro-batch of one row is perturbed whole. "
    "Default 1, the paper's method."
)
