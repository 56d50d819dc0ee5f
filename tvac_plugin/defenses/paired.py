"""The same tokens with the adapter and without it, in place of a second model to compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.configs.representations import RepresentationConfig
from tvac_plugin.defenses.base import Host, trainable
from tvac_plugin.model.adapters import adapter_off, learning_outside_adapter
from tvac_plugin.model.architecture import find_blocks
from tvac_plugin.model.numerics import precise
from tvac_plugin.model.types import Batch, Outputs

_TINY = 1e-6


class Paired(NamedTuple):
    """What the model gives for one batch.

    Attributes:
        now: With the adapter, and its autograd graph.
        before: Without it, and without a graph.
    """

    now: Outputs
    before: Outputs

    def states(self, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Hidden states behind `layers`, with the adapter and without, each [layers, batch, sequence, hidden]."""
        return _stacked(self.now.hidden_states, layers), _stacked(self.before.hidden_states, layers)


class PairedModel:
    """A model whose adapter can be left out, and the layers to look behind.

    Attributes:
        weights: What learns, all of it in the adapter.
        layers: Layers counted from 1, so that they index `Outputs.hidden_states`.
    """

    def __init__(self, model: nn.Module, config: RepresentationConfig) -> None:
        """Changes nothing in `model`.

        Raises:
            UserError: There is no adapter, something else learns too, nothing learns below the layers, or a layer
                is not there.
        """
        name, blocks = config.block, find_blocks(model)
        for problem in config.model_problems(len(blocks)):
            raise UserError(problem)
        if not hasattr(model, "disable_adapter"):
            raise UserError(
                f"{name} compares the model with its adapter and without it, and {type(model).__name__} has none. Set "
                "`adapter: lora`, or pass a model with a LoRA."
            )
        outside = learning_outside_adapter(model)
        if outside:
            raise UserError(
                f"{name} compares the model with its adapter and without it, and {outside[0]} learns outside the "
                "adapter, which neither shows. Train the adapter alone."
            )
        self.weights, self.layers = trainable(model), config.layers_of(len(blocks))
        if not any(trainable(block.layer) for block in blocks[: self.layers[-1]]):
            raise UserError(
                f"{name} moves hidden states behind layer {self.layers[-1]}, and nothing learns at or below it. Raise "
                f"`{name}.{config.relative}`, or give these layers an adapter."
            )
        self._model = model

    def __call__(self, host: Host, batch: Batch) -> Paired:
        """Runs `batch` without the adapter, then with it."""
        with host.auxiliary(), torch.no_grad(), adapter_off(self._model):
            before = host.outputs(batch, hidden_states=True)
        with host.auxiliary():
            return Paired(host.outputs(batch, hidden_states=True), before)


class _Mean(torch.autograd.Function):
    """The mean over processes, whose gradient is the mean of the gradients that they have for it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, mean: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.mean = mean
        return mean(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.mean(gradient), None


def centre(host: Host, states: Tensor, mask: Tensor) -> Tensor:
    """Mean state over the tokens of `mask` in the batches of all processes, with its autograd graph.

    Args:
        host: Knows the processes; averaged over them, gradients of a loss of the centre are those of one process that
            has all rows.
        states: [layers, batch, sequence, hidden].
        mask: [batch, sequence]; nowhere empty on all processes, or the centre is zero.

    Returns:
        [layers, 1, 1, hidden].
    """
    kept = mask.to(states.device)
    total = torch.where(kept[..., None], states, 0.0).sum(dim=(1, 2), keepdim=True)
    mean: Tensor = _Mean.apply(total, host.mean_across_processes)  # type: ignore[no-untyped-call]
    return mean / host.mean_across_processes(kept.sum().to(states.dtype)).clamp(min=_TINY)


def answer_mask(batch: Batch) -> Tensor:
    """Which tokens are part of an answer, [batch, sequence]."""
    mask: Tensor = batch["labels"] != -100
    return mask


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values`, [layers, batch, sequence], over layers and the tokens of `mask`, [batch, sequence].

    Zero, with a graph, where the mask is empty.
    """
    kept = mask.to(values.device).expand_as(values)
    return torch.where(kept, values, 0.0).sum() / kept.sum().clamp(min=1)


def _stacked(states: Sequence[Tensor], layers: Sequence[int]) -> Tensor:
    device = states[layers[-1]].device
    return torch.stack([precise(states[layer]).to(device) for layer in layers])
