"""Settings of the defenses after which a model that is trained on harm loses what it can do: CTRAP and SEAM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, field_validator

from tvac_plugin.boundary.errors import UserError, shown
from tvac_plugin.configs.base import DefenseConfig, NumRows, Scale, Stream, too_weak

_LARGEST_ID = 10_000_000
_BATCH = "on each process, once per optimizer step whatever the accumulation."


class CTRAPConfig(DefenseConfig):
    """Settings of CTRAP (arXiv 2505.16559)."""

    block = "ctrap"
    strengths = ("collapse_scale",)

    collapse_scale: Scale = Field(
        default=0.1,
        description="Weight of the collapse after one harmful step (paper: lambda). Default 0.1, as in the paper.",
    )
    harmful_step_size: float = Field(
        default=0.1,
        gt=0,
        le=1000,
        description="What the harmful gradient, not normalised, is multiplied by in that step (paper: alpha). Default "
        "0.1, as in the paper.",
    )
    collapse_token: int | str | None = Field(
        default=None,
        description="The one token that the model is to say everywhere after a harmful step (paper: e): its id, or its "
        "text, which must be exactly one token of the model's tokenizer. Default None, the token that ends a text: "
        "`eos_token_id` of the model's config.",
    )
    batch_size: NumRows = Field(
        default=10, description=f"Harmful examples, and as many general ones, {_BATCH} Default 10, as Booster's."
    )

    @field_validator("collapse_token", mode="before")
    @classmethod
    def _refuse_what_is_no_token(cls, value: Any) -> Any:
        is_id = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST_ID
        if value is None or is_id or (isinstance(value, str) and value):
            return value
        raise UserError(
            f"{cls.block}.collapse_token: must be a token's id, a whole number from 0, or its text "
            f'(got {shown(value)}). Write it as `collapse_token: "error"`.'
        )

    def streams(self) -> Mapping[str, Stream]:
        """Harmful examples for the step, and general ones, on which the model is to collapse after it."""
        return {
            "harmful": Stream("harmful_datasets", self.batch_size),
            "general": Stream("retain_datasets", self.batch_size),
        }

    def effect_problems(self) -> list[str]:
        """Nothing is trapped with a weight of 0; without a harmful step the model would collapse at once."""
        return super().effect_problems() + too_weak(self.block, harmful_step_size=self.harmful_step_size)

    def with_tokenizer(self, tokenizer: Any) -> Self:
        """The token as an id.

        Raises:
            UserError: Its text is not one token.
        """
        if not isinstance(self.collapse_token, str):
            return self
        token = _only_token(self.collapse_token, tokenizer, key=f"{self.block}.collapse_token")
        return self.model_copy(update={"collapse_token": token})


class SEAMConfig(DefenseConfig):
    """Settings of SEAM (arXiv 2505.12186)."""

    block = "seam"
    strengths = ("unlearning_scale", "self_destruct_scale")

    unlearning_scale: Scale = Field(
        default=1.0, description="Weight of the ascent on harmful answers; the paper has none. Default 1."
    )
    refusal_scale: Scale = Field(
        default=1.0,
        description="Weight of the cross-entropy on the pairs' refusals (paper: alpha); 0 leaves refusals to "
        "`datasets:`. Default 1, from the published code.",
    )
    self_destruct_scale: Scale = Field(
        default=0.01,
        description="Weight of the cosine between the harmful and the benign gradient (paper: beta). Default 0.01, "
        "from the published code.",
    )
    probe_step_size: float = Field(
        default=0.001,
        ge=1e-6,
        le=1,
        description="Length of the steps along which the change of a gradient is taken (paper: epsilon). bfloat16 "
        "rounds short ones away. Default 0.001, from the published code.",
    )
    batch_size: NumRows = Field(
        default=4, description=f"Pairs, and as many benign rows, {_BATCH} Default 4, from the published script."
    )

    def streams(self) -> Mapping[str, Stream]:
        """Pairs of a harmful answer and a refusal of the same prompt, and benign rows."""
        return {
            "pairs": Stream("harmful_datasets", self.batch_size, pairs_with="refusal_datasets"),
            "benign": Stream("retain_datasets", self.batch_size),
        }


def _only_token(text: str, tokenizer: Any, *, key: str) -> int:
    """The id of the one token that `text` is.

    Raises:
        UserError: It is several, or none that is known; or there is no tokenizer.
    """
    if tokenizer is None:
        raise UserError(f"{key}: {shown(text)} is text, and there is no tokenizer to read it. Give a token's id.")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) == 1 and (ids[0] != tokenizer.unk_token_id or text == tokenizer.unk_token):
        return int(ids[0])
    found = "is not in the tokenizer's vocabulary"
    if len(ids) != 1:
        parts = ", ".join(shown(part) for part in tokenizer.convert_ids_to_tokens(ids))
        found = f"is {len(ids)} tokens ({parts})" if ids else "is no token"
    raise UserError(
        f"{key}: {shown(text)} {found}, and it must be exactly one token. Name a short, common word, with a space "
        "before it where the tokenizer wants one, or give a token's id."
    )
