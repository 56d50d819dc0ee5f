"""Settings of the alignment-stage defenses that train on harmful data: RepNoise, TAR and Booster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from tvac_plugin.configs.base import DefenseConfig, Rows, Scale, Stream

TamperLoss = Literal["dpo", "entropy"]
LearningRate = Annotated[float, Field(gt=0, le=10)]
BetaShape = Annotated[float, Field(gt=0, le=1000)]
_BATCH = "on each process, once per optimizer step whatever the accumulation."


class RepNoiseConfig(DefenseConfig):
    """Settings of RepNoise (arXiv 2405.14577)."""

    block = "rep_noise"

    alpha: Scale = Field(
        default=1.0,
        description="Weight of the ascent on harmful answers (paper: alpha). Default 1, from the published code.",
    )
    beta: Scale = Field(
        default=0.001,
        description="Weight of the noise loss (paper: beta). Default 0.001, from the published code.",
    )
    refusal_scale: Scale = Field(
        default=1.0,
        description="Weight of the cross-entropy on the pairs' refusals; 0 leaves refusals to `datasets:`. Default 1, "
        "as in the published code.",
    )
    batch_size: Rows = Field(default=4, description=f"Pairs, {_BATCH} Default 4, from the published demo.")

    def streams(self) -> Mapping[str, Stream]:
        """Pairs of a harmful answer and a refusal of the same prompt."""
        return {"pairs": Stream("harmful_datasets", self.batch_size, pairs_with="refusal_datasets")}


class BoosterConfig(DefenseConfig):
    """Settings of Booster (arXiv 2409.01586)."""

    block = "booster"

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
    batch_size: Rows = Field(
        default=10, description=f"Harmful examples, {_BATCH} Default 10, from the published script."
    )

    def streams(self) -> Mapping[str, Stream]:
        """Harmful examples; the same batch before and after the step."""
        return {"harmful": Stream("harmful_datasets", self.batch_size)}


class TARConfig(DefenseConfig):
    """Settings of TAR (arXiv 2408.00761)."""

    block = "tar"

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
        description="Inner step k counts exp(decay * (k - last)), so that late steps count most (code: lambda_s). "
        "Default 0.0625, from the published code.",
    )
    adversary_learning_rates: Annotated[list[LearningRate], Field(min_length=1)] = Field(
        default=[2e-6, 2e-5, 4e-5],
        description="The adversary draws one for each optimizer step. Default [2e-06, 2e-05, 4e-05], from the "
        "published code for full parameters; an adapter needs larger ones.",
    )
    adversary_batch_size: Rows = Field(
        default=4, description="Examples of one inner step, on each process. Default 4, from the published script."
    )
    switch_beta: tuple[BetaShape, BetaShape] = Field(
        default=(6.0, 3.0),
        strict=False,
        description="With `retain_datasets`, the adversary trains on these first and turns to harmful data after a "
        "Beta-distributed share of its steps. Default (6.0, 3.0), from the published code.",
    )
    held_out: float = Field(
        default=0.2,
        gt=0,
        lt=1,
        description="Share of harmful rows, the last ones, that the adversary never sees and the tamper loss is taken "
        "on. Default 0.2.",
    )
    batch_size: Rows = Field(
        default=8,
        description=f"Held-out rows of the tamper loss and retain rows, {_BATCH} Default 8, from the published script.",
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
            raise ValueError(
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
