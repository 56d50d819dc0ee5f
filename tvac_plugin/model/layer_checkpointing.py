"""Activation checkpointing, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

_FLAG = "gradient_checkpointing"
_FUNCTION = "_gradient_checkpointing_func"


def can_checkpoint(layer: nn.Module) -> bool:
    """Whether the layer has a switch of its own, as those of current transformers do."""
    return hasattr(layer, _FLAG)


@contextmanager
def checkpointed(layers: Mapping[nn.Module, bool]) -> Iterator[None]:
    """Switches checkpointing on or off for each of `layers`; inside it a layer that is on keeps only its input.

    The kind is the non-reentrant one, whichever the layer had: the other hides the gradients that defenses read.
    """
    before = {layer: {name: layer.__dict__.get(name) for name in (_FLAG, _FUNCTION)} for layer in layers}
    try:
        for layer, is_on in layers.items():
            setattr(layer, _FLAG, is_on)
            setattr(layer, _FUNCTION, partial(checkpoint, use_reentrant=False))
        yield
    finally:
        for layer, attributes in before.items():
            for name, value in attributes.items():
                layer.__dict__.pop(name, None)
                if value is not None:
                    setattr(layer, name, value)
