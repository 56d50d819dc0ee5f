"""Settings of the defenses that a fine-tuning service uses while a user's data is trained on."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from tvac_plugin.configs.base import LEAST, DefenseConfig, NumRows, Scale, Steps, Stream, too_weak


class LisaConfig(DefenseConfig):
    """Settings of Lisa, lazy safety alignment (arXiv 2405.18641); not of layer-wise LISA."""

    block = "lisa"
    stage = "fine_tuning"

    alignment_steps: int = Field(
        default=100,
        ge=0,
        le=10_000_000,
        description="Optimizer steps on `alignment_datasets:` in one cycle (paper: K1). Default 100, from the "
        "published script.",
    )
    user_steps: Steps = Field(
        default=900,
        description="Optimizer steps on the user's data in one cycle (paper: K2). Default 900, from the published "
        "script.",
    )
    rho: Scale = Field(
        default=1.0,
        description="Weight of the pull towards the weights at which the other state ended (paper: rho). Default 1, "
        "from the published script.",
    )
    warmup_ratio: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Share of all steps, at the start, without that pull; the step at which exactly that share is over "
        "has none either. Default 0.1, from the published code.",
    )
    batch_size: NumRows = Field(
        default=10,
        description="Alignment examples per optimizer step, on each process. Default 10; the published script uses its "
        "user batch size, 5.",
    )

    def streams(self) -> Mapping[str, Stream]:
        """Alignment data, unless there is no alignment state."""
        if self.alignment_steps == 0:
            return {}
        return {"alignment": Stream("alignment_datasets", self.batch_size)}

    def effect_problems(self) -> list[str]:
        """Where next to no steps are on alignment data all that defends is the pull, which waits for the warm-up."""
        share = self.alignment_steps / (self.alignment_steps + self.user_steps)
        pulls = self.rho >= LEAST and 1 - self.warmup_ratio >= LEAST
        if share >= LEAST or pulls:
            return []
        if not self.alignment_steps and self.rho < LEAST:
            return too_weak(self.block, alignment_steps=0, rho=self.rho)
        return [
            f"lisa.alignment_steps: {self.alignment_steps}, lisa.user_steps: {self.user_steps}, lisa.rho: {self.rho:g} "
            f"and lisa.warmup_ratio: {self.warmup_ratio:g}: nothing would be defended. Raise alignment_steps, or rho "
            "with a shorter warm-up."
        ]
