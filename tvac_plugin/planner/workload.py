"""The part of a recipe that decides memory and work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from tvac_plugin.boundary.errors import UserError

Adapter = Literal["lora", "qlora"]

_UNPLANNED: dict[str, str] = {
    "load_in_8bit": "8-bit weights are not counted. Plan 4-bit weights with `adapter: qlora`, or 16-bit ones.",
    "lora_target_parameters": "adapters on single parameters are not counted. Plan with `lora_target_modules`.",
    "lora_on_cpu": "only what is on the GPU is counted. Plan without it.",
    "unfrozen_parameters": "partly frozen models are not counted. Plan without it, for an upper bound.",
}
_PRECISIONS = {"bf16": (torch.bfloat16, True), "fp16": (torch.float16, True), "bfloat16": (torch.bfloat16, False),
               "float16": (torch.float16, False)}  # fmt: skip
_EAGER = "eager"


@dataclass(frozen=True)
class Workload:
    """One micro-batch and the state that is kept around it.

    Attributes:
        batch_size: Rows of a micro-batch.
        sequence_len: Tokens of a row, all rows being full.
        accumulation: Micro-batches of an optimizer step.
        answer_share: The part of the tokens that have a label, 0 to 1.
        dtype: Of the frozen weights, and of what autocast computes in.
        autocast: Whether the trainer runs the model under autocast and takes its outputs in float32.
        adapter: `None` for full fine-tuning.
        lora: Arguments of `peft.LoraConfig`.
        quantization: Arguments of `transformers.BitsAndBytesConfig` beside Axolotl's own.
        optimizer: Its name in transformers.
        checkpointing: Whether all layers keep only their input.
        attention: `sdpa`, which stands for all fused kernels, or `eager`.
    """

    batch_size: int
    sequence_len: int
    accumulation: int
    answer_share: float
    dtype: torch.dtype
    autocast: bool
    adapter: Adapter | None
    lora: dict[str, Any]
    quantization: dict[str, Any]
    optimizer: str
    checkpointing: bool
    attention: str


def read_workload(recipe: Mapping[str, Any], *, answer_share: float = 1.0) -> Workload:
    """Takes from `recipe` what decides memory and work; keys that are absent have Axolotl's defaults.

    Raises:
        UserError: A value makes no sense, or asks for what is not counted.
    """
    for key, reason in _UNPLANNED.items():
        if recipe.get(key):
            raise UserError(f"{key}: {reason}")
    if not 0 < answer_share <= 1:
        raise UserError(f"--answer-share {answer_share}: must be above 0 and at most 1.")
    adapter = recipe.get("adapter")
    if adapter not in (None, "lora", "qlora"):
        raise UserError(f"adapter: {adapter} is not counted. Plan `lora`, `qlora` or full fine-tuning.")
    if adapter == "qlora" and not recipe.get("load_in_4bit"):
        raise UserError("adapter: qlora needs 4-bit weights. Add `load_in_4bit: true`.")
    dtype, autocast = _precision(recipe)
    return Workload(
        batch_size=_whole(recipe, "micro_batch_size", 1),
        sequence_len=_whole(recipe, "sequence_len", 512),
        accumulation=_whole(recipe, "gradient_accumulation_steps", 1),
        answer_share=answer_share,
        dtype=dtype,
        autocast=autocast,
        adapter=adapter,
        lora=_lora(recipe),
        quantization=dict(recipe.get("bnb_config_kwargs") or {}),
        optimizer=str(recipe.get("optimizer") or "adamw_torch_fused"),
        checkpointing=bool(recipe.get("gradient_checkpointing")),
        attention=_EAGER if recipe.get("attn_implementation") == _EAGER else "sdpa",
    )


def _whole(recipe: Mapping[str, Any], key: str, default: int) -> int:
    value = recipe.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{key}: must be a whole number above 0 (got {value!r}).")
    return value


def _precision(recipe: Mapping[str, Any]) -> tuple[torch.dtype, bool]:
    for key, precision in _PRECISIONS.items():
        if recipe.get(key):
            return precision
    is_decided = any(recipe.get(key) is not None for key in ("bf16", "fp16"))
    return (torch.float32, False) if is_decided else _PRECISIONS["bf16"]  # `auto` on a GPU that can


def _lora(recipe: Mapping[str, Any]) -> dict[str, Any]:
    targets = "all-linear" if recipe.get("lora_target_linear") else recipe.get("lora_target_modules")
    settings = {
        "r": recipe.get("lora_r") or 8,
        "lora_alpha": recipe.get("lora_alpha") or 16,
        "lora_dropout": recipe.get("lora_dropout") or 0.0,
        "target_modules": targets,
        "exclude_modules": recipe.get("lora_exclude_modules"),
        "modules_to_save": recipe.get("lora_modules_to_save"),
        "layers_to_transform": recipe.get("peft_layers_to_transform"),
        "layers_pattern": recipe.get("peft_layers_pattern"),
        "rank_pattern": recipe.get("lora_rank_pattern"),
        "use_dora": recipe.get("peft_use_dora"),
        "use_rslora": recipe.get("peft_use_rslora"),
    }
    return {key: value for key, value in settings.items() if value is not None}
