"""The parts of a decoder, found by structure, and why a model has none that could be defended.

A block is an element of a `ModuleList` whose every element holds an attention submodule; class names play no role.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.configs.base import Site

_ATTENTION_NAMES = ("attn", "attention")
_MLP_NAMES = ("mlp", "ffn", "feed_forward", "moe")
_SIDE_OUTPUTS = ("output_router_logits", "num_kv_shared_layers")
_DECODER_ONLY = "Use a decoder-only language model."


@dataclass(frozen=True)
class DecoderBlock:
    """One decoder layer.

    Attributes:
        index: Position in the decoder, 0 next to the embeddings.
        layer: The whole block.
        attention: Its attention submodule; its output is read before the residual addition.
        mlp: Its feed-forward submodule, `None` where the block has no module for it (OPT).
    """

    index: int
    layer: nn.Module
    attention: nn.Module
    mlp: nn.Module | None

    def module(self, site: Site) -> nn.Module:
        """Returns the submodule whose output `site` means.

        Raises:
            UserError: The block has no module at that site.
        """
        module = {"attention": self.attention, "mlp": self.mlp, "layer": self.layer}[site]
        if module is None:
            raise UserError(
                f"perturb: {site} is not possible here: {type(self.layer).__name__} has no feed-forward module. "
                "Use perturb: attention or perturb: layer."
            )
        return module


def find_blocks(model: nn.Module) -> tuple[DecoderBlock, ...]:
    """Finds the decoder blocks of `model`, in order; those of the language model if it is multimodal.

    Raises:
        UserError: It is an encoder-decoder, or no list of blocks, or more than one, was found.
    """
    found = [] if is_encoder_decoder(model) else _block_lists(model)
    if len(found) > 1:
        found = _block_lists(text_decoder(model))
    if len(found) != 1:
        raise UserError(refusal(model, num_lists=len(found)))
    return found[0]


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last block and the head: the one beside the list of blocks.

    Raises:
        UserError: There is none, or more than one.
    """
    first = find_blocks(model)[0].layer
    for module in model.modules():
        children = dict(module.named_children())
        if any(isinstance(child, nn.ModuleList) and first in list(child) for child in children.values()):
            norms = [child for name, child in children.items() if _is_final_norm(name)]
            if len(norms) == 1:
                return norms[0]
    raise UserError(f"{type(model).__name__} has no norm before its head that could be found. Use another defense.")


def has_side_outputs(model: nn.Module) -> bool:
    """Whether layers hand on more than their output: router logits for a loss of their own, or keys and values."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return any(getattr(text, name, None) for name in _SIDE_OUTPUTS)


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


def _is_final_norm(name: str) -> bool:
    return ("norm" in name or name.startswith("ln_")) and "emb" not in name and not name.startswith("per_layer_")


def _block_lists(model: nn.Module) -> list[tuple[DecoderBlock, ...]]:
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [blocks for modules in lists if (blocks := _as_blocks(modules))]


def _as_blocks(modules: nn.ModuleList) -> tuple[DecoderBlock, ...]:
    blocks = []
    for index, layer in enumerate(modules):
        attention = attention_of(layer)
        if attention is None:
            return ()
        blocks.append(DecoderBlock(index, layer, attention, mlp_of(layer)))
    return tuple(blocks)


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
