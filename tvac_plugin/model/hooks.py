"""Hooks on the outputs of modules, and frozen flags, that always come off.

Works on any `torch.nn.Module` tree: plain, wrapped by PEFT, quantized, or checkpointed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Offset = Tensor | Callable[[Tensor], Tensor]
"""What is added to an output: a tensor of its shape, or how to get one from it."""


@dataclass
class Fired:
    """What a perturbation did to the module at each key, in its first forward pass; recomputation does not count.

    Attributes:
        changed: Whether the output was another one afterwards; an offset that rounding takes away leaves it as it was.
    """

    changed: dict[int, Tensor] = field(default_factory=dict)

    def norm(self, length: Tensor) -> Tensor:
        """`length`, or zero if no output was changed."""
        flags = torch.stack([flag.to(length.device) for flag in self.changed.values()])
        return torch.where(flags.any(), length, 0.0)


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
            hidden = _hidden(output, inputs)
            if not drawn and not isinstance(offset, Tensor):
                drawn.append(offset(hidden.detach()))
            moved = hidden + drawn[0].to(hidden.dtype)
            if key not in fired.changed:
                fired.changed[key] = (moved.detach() != hidden.detach()).any()
            return _with_hidden(output, moved)

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
