"""4-bit weights of bitsandbytes, which evaluation on some processors would spoil for training.

On a CPU with AVX512-BF16, a `Linear4bit` in evaluation mode packs its weight in place for a faster product. The packing
rounds the weight's scales, and a packed weight passes no gradient: what lies below it stops learning without an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from tvac_plugin.boundary.errors import UserError

_FLAGS = ("support_avx512bf16_for_cpu", "compute_dtype", "compute_type_is_set")
"""Whether a layer packs, and what it remembers of the first input it saw."""


@contextmanager
def kept_trainable(model: nn.Module) -> Iterator[None]:
    """Inside it no 4-bit weight of `model` is packed; at the end the layers' flags are what they were."""
    before = {layer: {flag: getattr(layer, flag) for flag in _FLAGS} for layer in _four_bit_layers(model)}
    try:
        for layer in before:
            layer.support_avx512bf16_for_cpu = False
        yield
    finally:
        for layer, flags in before.items():
            for flag, value in flags.items():
                setattr(layer, flag, value)


def refuse_packed(model: nn.Module) -> None:
    """Refuses a model that cannot learn any more.

    Raises:
        UserError: Some of its 4-bit weights are packed for inference.
    """
    for layer in _four_bit_layers(model):
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise UserError(
                "the model was evaluated before training, and on this processor bitsandbytes then packs 4-bit weights "
                "in a way that passes no gradient. Load the model again and train it before you evaluate it."
            )


def _four_bit_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if all(hasattr(module, flag) for flag in _FLAGS)]
