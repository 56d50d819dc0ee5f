"""Settings of the alignment-stage defenses that train on harmful data: RepNoise, TAR and Booster."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.configs.base import (
    DATA_KEYS,
    DefenseConfig,
    NumRows,
    Scale,
    Stream,
    example_entry,
    too_weak,
    too_weak_together,
)

TamperLoss = Literal["dpo", "entropy"]
LearningRate = Annotated[float, Field(gt=0, le=10)]
BetaShape = Annotated[float, Field(gt=0, le=1000)]
_LEAST_RATE = 1e-9
_BATCH = "on each process, once per optimizer step whatever the accumulation."


class RepNoiseConfig(DefenseConfig):
    """Settings of RepNoise (arXiv 2405.14577)."""

    block = "rep_noise"
    strengths = ("alpha", "beta")

    alpha: Scale = Field(
        default=1.0,
        description="Weight of the ascent on harmful answers (paper: alpha). Default 1, from the published code.",
    )
    beta: Scale = Field(
        default=0.001, description="Weight of the noise loss (paper: beta). Default 0.001, from the published code."
    )
    refusal_scale: Scale = Field(
        default=1.0,
        description="Weight of the cross-entropy on the pairs' refusals; 0 leaves refusals to `datasets:`. Default 1, "
        "as in the published code.",
    )
    batch_size: NumRows = Field(default=4, description=f"Pairs, {_BATCH} Default 4, from the published demo.")

    def streams(self) -> Mapping[str, Stream]:
        """Pairs of a harmful answer and a refusal of the same prompt."""
        return {"pairs": Stream("harmful_datasets", self.batch_size, pairs_with="refusal_datasets")}


class BoosterConfig(DefenseConfig):
    """Settings of Booster (arXiv 2409.01586)."""

    block = "booster"
    strengths = ("regularizer_scale",)

    regularizer_scale: Scale = Field(
        default=5.0,
        description="Weight of the harmful loss's drop under one harmful step (paper: lambda). Default 5, from the "
        "published script.",
    )
    harmful_step_size: float = Field(
        default=0.1,
        gt=0,
        le=1000,
        description="Length of the normalised harmful step (paper: alpha). Default 0.1, from the published script.",
    )
    batch_size: NumRows = Field(
        default=10, description=f"Harmful examples, {_BATCH} Default 10, from the published script."
    )

    def streams(self) -> Mapping[str, Stream]:
        """Harmful examples; the same batch before and after the step."""
        return {"harmful": Stream("harmful_datasets", self.batch_size)}

    def effect_problems(self) -> list[str]:
        """Nothing is attenuated with a weight of 0, or a step of 0."""
        weight, step = self.regularizer_scale, self.harmful_step_size
        alone = super().effect_problems() + too_weak(self.block, harmful_step_size=step)
        return alone or too_weak_together(self.block, regularizer_scale=weight, harmful_step_size=step)


class TARConfig(DefenseConfig):
    """Settings of TAR (arXiv 2408.00761)."""

    block = "tar"
    strengths = ("tamper_scale",)

    tamper_loss: TamperLoss = Field(
        default="dpo",
        description="What must stay low under attack: `dpo`, preferring the refusal to the harmful answer (paper, "
        "refusal); `entropy`, the negative entropy on harmful answers (paper, knowledge). Default dpo.",
    )
    tamper_scale: Scale = Field(
        default=4.0,
        description="Weight of the tamper-resistance gradient (paper: lambda_TR). Default 4, from the published "
        "script.",
    )
    inner_steps: int = Field(
        default=64, ge=1, le=10_000, description="Steps of the adversary (paper: K). Default 64, as in the paper."
    )
    tamper_every: int = Field(
        default=4,
        ge=1,
        le=10_000,
        description="Inner steps between two evaluations of the tamper loss; at most `inner_steps`. Default 4, from "
        "the published code.",
    )
    schedule_decay: float = Field(
        default=0.0625,
        ge=0,
        le=100,
        description="Inner step k has weight exp(decay * (k - last)), so late steps count most (code: lambda_s). "
        "Default 0.0625, from the published code.",
    )
    adversary_learning_rates: Annotated[list[LearningRate], Field(min_length=1)] = Field(
        default=[2e-6, 2e-5, 4e-5],
        description="The adversary draws one for each optimizer step. Default [2e-06, 2e-05, 4e-05], from the "
        "published code for full parameters; an adapter needs larger ones.",
    )
    adversary_batch_size: NumRows = Field(
        default=4, description="Examples per inner step, on each process. Default 4, from the published script."
    )
    switch_share: float = Field(
        default=0.33,
        ge=0,
        le=1,
        description="With `retain_datasets`, the share of optimizer steps whose adversary trains on these first and "
        "then switches to harmful data; the others are harmful throughout. Default 0.33, from the published script.",
    )
    switch_beta: tuple[BetaShape, BetaShape] = Field(
        default=(6.0, 3.0),
        strict=False,
        description="Shape of the Beta distribution of the share of its steps after which such an adversary switches. "
        "Default (6.0, 3.0), from the published code.",
    )
    held_out: float = Field(
        default=0.2,
        gt=0,
        lt=1,
        description="Share of harmful rows, the last ones, that the adversary never sees; the tamper loss is computed "
        "on them. Default 0.2.",
    )
    batch_size: NumRows = Field(
        default=8,
        description=f"Held-out rows for the tamper loss, and retain rows, {_BATCH} Default 8, from the published "
        "script.",
    )
    retain_scale: Scale = Field(
        default=1.0,
        description="Weight of the retain loss and the representation term (paper: lambda_retain). Default 1.",
    )
    representation_scale: Scale = Field(
        default=1.0,
        description="Weight of the distance between hidden states and those before training, inside the retain loss. "
        "Default 1, from the published code.",
    )
    dpo_beta: float = Field(default=0.1, gt=0, le=100, description="DPO's beta. Default 0.1, from the published code.")

    @model_validator(mode="after")
    def _refuse_a_tamper_loss_that_never_comes(self) -> TARConfig:
        if self.tamper_every > self.inner_steps:
            raise UserError(
                f"tar.tamper_every: {self.tamper_every} is more than inner_steps ({self.inner_steps}), so the tamper "
                f"loss would never be taken. Set it to {self.inner_steps} or less."
            )
        return self

    def streams(self) -> Mapping[str, Stream]:
        """The adversary's harmful rows, the held-out ones, and optional retain data."""
        seen, held_out = (0.0, 1 - self.held_out), (1 - self.held_out, 1.0)
        paired = "refusal_datasets" if self.tamper_loss == "dpo" else None
        return {
            "adversary": Stream("harmful_datasets", self.adversary_batch_size, share=seen),
            "tamper": Stream("harmful_datasets", self.batch_size, pairs_with=paired, share=held_out),
            "benign": Stream("retain_datasets", self.adversary_batch_size, optional=True),
            "retain": Stream("retain_datasets", self.batch_size, optional=True),
        }

    def advice(self, keys: Collection[str]) -> list[str]:
        """Without retain data the representation term acts on the alignment data, and would keep what they unteach."""
        if "retain_datasets" in keys or not self.retain_scale:
            return []
        return [
            "tar has no `retain_datasets:`. It then holds hidden states on `datasets:` to those before training, so a "
            "model that does not refuse yet is held to answering, and no adversary switches. Start from a merged "
            f"aligned model, and add {DATA_KEYS['retain_datasets']}: `{example_entry('retain_datasets')}`."
        ]

    def effect_problems(self) -> list[str]:
        """Nothing is made resistant with a weight of 0, or against an adversary that never moves."""
        weak = too_weak(self.block, tamper_scale=self.tamper_scale)
        if max(self.adversary_learning_rates) < _LEAST_RATE:
            weak.append(
                f"tar.adversary_learning_rates: {self.adversary_learning_rates}: the adversary would not move, so "
                f"nothing would be defended. Set one to {_LEAST_RATE:g} or more."
            )
        if self.tamper_loss == "dpo":
            weak += too_weak(self.block, dpo_beta=self.dpo_beta)
            weak = weak or too_weak_together(self.block, tamper_scale=self.tamper_scale, dpo_beta=self.dpo_beta)
        return weak

    @classmethod
    def for_benchmark(cls, *, rows: int, layers: int) -> dict[str, Any]:
        """A short attack; its cost grows in proportion to its steps."""
        return {"inner_steps": 4, "batch_size": rows, "adversary_batch_size": rows}
