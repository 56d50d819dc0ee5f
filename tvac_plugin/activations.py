"""Decoder blocks found by structure, and hooks on their outputs that always come off.

Works on any `torch.nn.Module` tree: plain, wrapped by PEFT, quantized, or checkpointed. A block is an element of a
`ModuleList` whose every element holds an attention submodule; class names play no role.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tvac_plugin.architecture import attention_of, is_encoder_decoder, mlp_of, refusal, text_decoder
from tvac_plugin.configs.base import Site

Offset = Tensor | Callable[[Tensor], Tensor]
"""What is added to an output: a tensor of its shape, or how to get one from it."""

_SIDE_OUTPUTS = ("output_router_logits", "num_kv_shared_layers")


@dataclass(frozen=True)
class Block:
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
            ValueError: The block has no module at that site.
        """
        module = {"attention": self.attention, "mlp": self.mlp, "layer": self.layer}[site]
        if module is None:
            raise ValueError(
                f"perturb: {site} is not possible here: {type(self.layer).__name__} has no feed-forward module. "
                "Use perturb: attention or perturb: layer."
            )
        return module


def find_blocks(model: nn.Module) -> tuple[Block, ...]:
    """Finds the decoder blocks of `model`, in order; those of the language model if it is multimodal.

    Raises:
        ValueError: It is an encoder-decoder, or no list of blocks, or more than one, was found.
    """
    found = [] if is_encoder_decoder(model) else _block_lists(model)
    if len(found) > 1:
        found = _block_lists(text_decoder(model))
    if len(found) != 1:
        raise ValueError(refusal(model, num_lists=len(found)))
    return found[0]


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last block and the head: the one beside the list of blocks.

    Raises:
        ValueError: There is none, or more than one.
    """
    first = find_blocks(model)[0].layer
    for module in model.modules():
        children = dict(module.named_children())
        if any(isinstance(child, nn.ModuleList) and first in list(child) for child in children.values()):
            norms = [child for name, child in children.items() if _is_final_norm(name)]
            if len(norms) == 1:
                return norms[0]
    raise ValueError(f"{type(model).__name__} has no norm before its head that could be found. Use another defense.")


def has_side_outputs(model: nn.Module) -> bool:
    """Whether layers hand on more than their output: router logits for a loss of their own, or keys and values."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return any(getattr(text, name, None) for name in _SIDE_OUTPUTS)


def _is_final_norm(name: str) -> bool:
    return ("norm" in name or name.startswith("ln_")) and "emb" not in name and not name.startswith("per_layer_")


def _block_lists(model: nn.Module) -> list[tuple[Block, ...]]:
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [blocks for modules in lists if (blocks := _as_blocks(modules))]


def _as_blocks(modules: nn.ModuleList) -> tuple[Block, ...]:
    blocks = []
    for index, layer in enumerate(modules):
        attention = attention_of(layer)
        if attention is None:
            return ()
        blocks.append(Block(index, layer, attention, mlp_of(layer)))
    return tuple(blocks)


@dataclass
class Fired:
    """How often a perturbation was added to the module at each key; recomputation does not count."""

    counts: dict[int, int] = field(default_factory=dict)


@contextmanager
def capture(modules: Mapping[int, nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Yields a dictionary that the next forward pass fills with the modules' outputs, ready for `autograd.grad`.

    An output that no trainable parameter reaches is replaced by an equal leaf, so that every captured tensor
    requires grad. Recomputation under checkpointing leaves the first pass's tensors in place.
    """
    outputs: dict[int, Tensor] = {}

    def hook_for(key: int) -> Any:
        def hook(_module: nn.Module, inputs: Any, output: Any) -> Any:
            hidden = _hidden(output, inputs)
            if hidden.requires_grad:
                outputs.setdefault(key, hidden)
                return _with_hidden(output, hidden)
            leaf = hidden.detach().requires_grad_()
            outputs.setdefault(key, leaf)
            return _with_hidden(output, leaf.clone())  # some layers add to it in place, which no leaf allows

        return hook

    with _hooks({key: (module, hook_for(key)) for key, module in modules.items()}):
        yield outputs


@contextmanager
def perturb(modules: Mapping[int, nn.Module], offsets: Mapping[int, Offset]) -> Iterator[Fired]:
    """Adds `offsets[key]` to the output of `modules[key]` in every forward pass inside the context.

    The offsets are constants: gradients pass through the addition unchanged. They are cast to the output's dtype. An
    offset may be a function of the output, called once; recomputation under checkpointing adds the same again.
    """
    fired = Fired()

    def hook_for(key: int, offset: Offset) -> Any:
        drawn: list[Tensor] = [offset] if isinstance(offset, Tensor) else []

        def hook(_module: nn.Module, inputs: Any, output: Any) -> Any:
            fired.counts.setdefault(key, 1)
            hidden = _hidden(output, inputs)
            if not drawn and not isinstance(offset, Tensor):
                drawn.append(offset(hidden.detach()))
            return _with_hidden(output, hidden + drawn[0].to(hidden.dtype))

        return hook

    with _hooks({key: (modules[key], hook_for(key, offset)) for key, offset in offsets.items()}):
        yield fired


@contextmanager
def frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Switches `requires_grad` off for those of `parameters` that have it, and on again at the end."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def _hooks(hooks: Mapping[int, tuple[nn.Module, Any]]) -> Iterator[None]:
    handles = []
    try:
        for module, hook in hooks.values():
            handles.append(module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hidden(output: Any, inputs: tuple[Any, ...]) -> Tensor:
    """The hidden states in a module's output as [batch, sequence, hidden]; some experts flatten the first two."""
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, torch.Tensor), f"a hooked module returned {type(output).__name__}"
    is_flat = hidden.ndim == 2 and bool(inputs) and isinstance(inputs[0], torch.Tensor) and inputs[0].ndim == 3
    return hidden.reshape(inputs[0].shape) if is_flat else hidden


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    """The output with other hidden states in it, in the shape that they had."""
    if isinstance(output, tuple):
        return (_with_hidden(output[0], hidden), *output[1:])
    return hidden if hidden.shape == output.shape else hidden.reshape(output.shape)
