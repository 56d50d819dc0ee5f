"""What the parts of a model are called, and why a model has none that could be defended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

_ATTENTION_NAMES = ("attn", "attention")
_MLP_NAMES = ("mlp", "ffn", "feed_forward", "moe")
_DECODER_ONLY = "Use a decoder-only language model."


def attention_of(layer: nn.Module) -> nn.Module | None:
    """The attention submodule of a decoder layer, softmax or linear; `None` if it has none."""
    return _child_with_weights(layer, _ATTENTION_NAMES)


def mlp_of(layer: nn.Module) -> nn.Module | None:
    """The feed-forward submodule of a decoder layer, dense or of experts; `None` if it has none."""
    return _child_with_weights(layer, _MLP_NAMES)


def text_decoder(model: nn.Module) -> nn.Module:
    """The language model inside a multimodal one; `model` itself where there is nothing else."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None  # type: ignore[operator]
    return decoder if isinstance(decoder, nn.Module) else model


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether half of the model reads and the other half writes."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def refusal(model: nn.Module, *, num_lists: int) -> str:
    """Why the layers of `model` cannot be told, with the way out.

    Args:
        model: What was searched.
        num_lists: How many lists of layers that all hold attention were found in it.
    """
    return f"{_name(model)} cannot be defended: {_reason(model, num_lists)}"


def _reason(model: nn.Module, num_lists: int) -> str:
    if is_encoder_decoder(model):
        return f"it is an encoder-decoder, of which only one half would be defended. {_DECODER_ONLY}"
    if num_lists > 1:
        return f"{num_lists} lists of decoder blocks with an attention submodule found. {_DECODER_ONLY}"
    layers = _largest_list(text_decoder(model))
    without = [index for index, layer in enumerate(layers) if attention_of(layer) is None]
    if not without:
        return f"no list of decoder blocks with an attention submodule found. {_DECODER_ONLY}"
    layer = layers[without[0]]
    children = ", ".join(name for name, _ in layer.named_children())
    which = "its layers" if len(without) == len(layers) else f"layers {', '.join(map(str, without))}"
    kind = type(layer).__name__
    return f"{which} hold no attention module ({kind}: {children}). Use a model with attention in every layer."


def _name(model: nn.Module) -> str:
    """The architecture's name, also of a model under an adapter."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return type(base).__name__


def _largest_list(model: nn.Module) -> nn.ModuleList:
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()), default=nn.ModuleList())


def _child_with_weights(layer: nn.Module, names: Sequence[str]) -> nn.Module | None:
    """The child with one of `names` in its name that holds matrices; norms and activations hold none."""
    for name, child in layer.named_children():
        is_named = any(part in name.lower() for part in names)
        if is_named and any(parameter.ndim >= 2 for parameter in child.parameters()):
            return child
    return None
