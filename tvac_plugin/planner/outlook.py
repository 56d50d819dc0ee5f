"""What a recipe that passed its check will do: its defense's settings, rows, steps, layers and passes."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

import torch

from tvac_plugin.configs.base import DefenseConfig
from tvac_plugin.configs.perturbation import OASISConfig, PerturbationConfig, RandomNoiseConfig, TVaccineConfig


def outlook(
    recipe: Mapping[str, Any], config: DefenseConfig | None, *, rows: int, num_layers: int | None
) -> dict[str, Any]:
    """What will happen, as JSON values.

    Args:
        recipe: After Axolotl's validation.
        config: Its defense; `None` for `none`.
        rows: Rows of the training data that are left after loading.
        num_layers: Of the model; `None` where it is not known.
    """
    size = recipe.get("val_set_size") or 0
    held_out = ceil(rows * size) if size < 1 else int(size)
    steps = _steps(recipe, rows - held_out)
    found: dict[str, Any] = {"rows": rows - held_out} | ({"rows_held_out": held_out} if held_out else {})
    found |= {"steps": steps, "layers": num_layers}
    if config is None:
        return found
    return {"settings": config.model_dump(mode="json")} | found | _passes(config, steps, num_layers)


def _steps(recipe: Mapping[str, Any], rows: int) -> int | None:
    """Optimizer steps in one process; `None` with packing, where it is known once rows are packed."""
    per_step = (recipe.get("micro_batch_size") or 1) * (recipe.get("gradient_accumulation_steps") or 1)
    limit = recipe.get("max_steps") or 0
    if recipe.get("sample_packing"):
        return None
    steps = ceil(rows / per_step * (recipe.get("num_epochs") or 1))
    return min(steps, limit) if limit > 0 else steps


def _passes(config: DefenseConfig, steps: int | None, num_layers: int | None) -> dict[str, Any]:
    if not isinstance(config, PerturbationConfig):
        return {"passes": "`axolotl tvac plan` counts them"}
    per_batch = 1 if isinstance(config, RandomNoiseConfig) else 2
    found: dict[str, Any] = {"passes": f"{per_batch} forward and backward for each micro-batch"}
    if isinstance(config, OASISConfig):
        probed = {} if steps is None else {"probes": ceil(steps / config.probe_steps)}
        return found | probed | {"layers_drawn": config.num_active_layers}
    if not isinstance(config, TVaccineConfig):
        return found
    probes = config.layer_sampling != "uniform"
    if steps is not None:
        found |= {"draws": ceil(steps / config.resample_steps)}
        found |= {"probes": ceil(steps / config.probe_steps)} if probes else {}
    if num_layers is not None:
        learns = " of the steps" if config.freeze == "layer" else f", for `freeze: {config.freeze}`"
        share = f"{config.num_active_layers / num_layers:.0%}" if config.freeze == "layer" else "all steps"
        found |= {"layers_drawn": config.num_active_layers, "a_layer_learns_in": f"{share}{learns}"}
    return found


def warnings(recipe: Mapping[str, Any], config: DefenseConfig | None, *, num_layers: int | None) -> list[str]:
    """What is legal and hardly meant, and what ends in an error on this machine; one sentence each with the way out.

    Args:
        recipe: As the user wrote it.
        config: Its defense; `None` for `none`.
        num_layers: Of the model; `None` where it is not known.
    """
    found = []
    if isinstance(config, TVaccineConfig) and config.num_active_layers == num_layers:
        found.append(
            f"t_vaccine.num_active_layers: all {num_layers} layers are drawn every time, so probes decide nothing. Set "
            f"it to about {max(1, num_layers // 4)}, or write `safety_defense: vaccine`."
        )
    return found if torch.cuda.is_available() else found + _without_cuda(recipe)


def _without_cuda(recipe: Mapping[str, Any]) -> list[str]:
    here = "this machine has no CUDA, and `axolotl train` would end in an error"
    found = []
    attention = str(recipe.get("attn_implementation") or "")
    if recipe.get("flash_attention") or attention.startswith("flash"):
        key = "flash_attention: true" if recipe.get("flash_attention") else f"attn_implementation: {attention}"
        found.append(f"`{key}`: {here}. Write `attn_implementation: sdpa` to train here.")
    if recipe.get("tf32") is True:
        found.append(f"`tf32: true`: {here}. Write `tf32: false` to train here.")
    is_auto = recipe.get("bf16", "auto") in ("auto", None) and recipe.get("fp16") is None
    if is_auto or recipe.get("fp16"):
        key = "fp16: true" if recipe.get("fp16") else "bf16: auto"
        found.append(f"`{key}`: without CUDA this means float16. Write `bf16: false` and `fp16: false` for float32.")
    return found
