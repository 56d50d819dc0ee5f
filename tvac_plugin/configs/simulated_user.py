"""The data of a simulated user."""

from __future__ import annotations

from pydantic import Field, model_validator

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.configs.base import Block, Entries
from tvac_plugin.configs.prompt_transform import NamedTransform


class SimulatedUserConfig(Block):
    """The data of a simulated user: a benign task with a share of harmful rows, as in the papers' attacks."""

    block = "simulated_user"

    num_samples: int = Field(
        default=1000, ge=1, le=10_000_000, description="Number of rows (papers: n). Default 1000, as in the papers."
    )
    harmful_ratio: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Share of harmful rows (papers: p), exact: round(p * n) rows. Default 0.1, as in the papers.",
    )
    task_datasets: Entries | None = Field(
        default=None,
        description="The benign task; entries as in `datasets:`. Required unless `harmful_ratio` is 1. "
        "Default: absent.",
    )
    harmful_datasets: Entries | None = Field(
        default=None,
        description="Harmful prompts with harmful answers; entries as in `datasets:`. Required unless `harmful_ratio` "
        "is 0. Default: absent.",
    )
    prompt_transform: NamedTransform | None = Field(
        default=None,
        description="How harmful prompts are rewritten (jailbreak tuning): `backdoor`, `competing_objectives`, "
        "`style`, or `{prompt: , answer: }` with `{prompt}` and `{answer}` in them. A chain then asks attacked models "
        "in the same way. Default: absent.",
    )
    seed: int = Field(default=42, ge=0, le=2**31 - 1, description="Seed for drawing and ordering rows. Default 42.")
    disjoint_from: Entries | None = Field(
        default=None,
        description="Alignment, probe and evaluation data; entries as in `datasets:`. A user's prompt that is also "
        "there is an error. A chain fills this in. Default: absent.",
    )
    drop_overlap: bool = Field(
        default=False,
        description="Leave rows whose prompt is in `disjoint_from` out of the draw and count them, instead of refusing "
        "them. Default False.",
    )

    @property
    def num_harmful(self) -> int:
        """Harmful rows, exactly."""
        return round(self.harmful_ratio * self.num_samples)

    @property
    def num_task(self) -> int:
        """Rows of the benign task."""
        return self.num_samples - self.num_harmful

    @model_validator(mode="after")
    def _refuse_missing_data(self) -> SimulatedUserConfig:
        for key, count, entries in (
            ("task_datasets", self.num_task, self.task_datasets),
            ("harmful_datasets", self.num_harmful, self.harmful_datasets),
        ):
            if count and not entries:
                raise UserError(f"simulated_user: {count} rows are to come from `{key}:`, which is missing. Add it.")
        return self
