"""The trainer's side of the seam in `tvac_plugin.defenses.base`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tvac_plugin import activations
from tvac_plugin.answers import answers_only
from tvac_plugin.defenses.base import Batch, Outputs, Pair, trainable
from tvac_plugin.trainers.reduction import average_gradients, mean_across_processes

if TYPE_CHECKING:
    from tvac_plugin.trainers.mixin import SafetyDefenseMixin


class TrainerHost:
    """`defenses.base.Host` for one micro-batch of a trainer; its methods are described there."""

    def __init__(self, trainer: SafetyDefenseMixin, model: nn.Module, num_items: Tensor | int | None) -> None:
        self._trainer = trainer
        self._model = model
        self._num_items = num_items
        assert trainer.streams is not None, "the defense was not configured"
        self._streams = trainer.streams

    def loss(self, batch: Batch) -> Tensor:
        """As `train`, with its graph."""
        trainer = self._trainer
        loss = self._forward(batch, self._num_items)
        is_normalised = trainer.model_accepts_loss_kwargs and self._num_items is not None
        if not is_normalised and trainer.compute_loss_func is None:
            loss = loss / trainer.current_gradient_accumulation_steps
        return loss

    def train(self, batch: Batch) -> Tensor:
        """The trainer's own step, whose gradients stay on this process until `finish_step`."""
        trainer = self._trainer
        answers = self._answers(batch, logits=trainer.reads_logits)
        with trainer.accelerator.no_sync(self._model), answers as inputs:
            return trainer.host_step(self._model, inputs, self._num_items)

    def finish_step(self) -> None:
        """Averages the gradients of what learns, on the last micro-batch of an optimizer step.

        DDP does not take part: it reduces what rests too, and cannot bear flags that change.
        """
        accelerator = self._trainer.accelerator
        if accelerator.sync_gradients:
            average_gradients(accelerator, trainable(self._model))

    def batch(self, stream: str, index: int) -> Batch:
        """A batch of the streams."""
        return self._streams.batch(stream, index)

    def pair(self, stream: str, index: int) -> Pair:
        """A pair of the streams."""
        return self._streams.pair(stream, index)

    def has(self, stream: str) -> bool:
        """Whether the streams have it."""
        return self._streams.has(stream)

    def mean_loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy."""
        return self._forward(batch, None)

    def outputs(self, batch: Batch, *, hidden_states: bool = False) -> Outputs:
        """Forward pass in the trainer's precision."""
        inputs = self._trainer._prepare_inputs({name: value for name, value in batch.items() if name != "labels"})
        self._model.train()
        with self._trainer.compute_loss_context_manager():
            outputs = self._model(**inputs, use_cache=False, output_hidden_states=hidden_states)
        return Outputs(outputs.logits, tuple(outputs.hidden_states or ()))

    def gradients(self, loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Through the loss scale of fp16, and averaged."""
        scale = self._loss_scale()
        found = torch.autograd.grad(loss * scale, list(parameters), allow_unused=True)
        gradients = [
            torch.zeros_like(parameter) if gradient is None else gradient / scale
            for parameter, gradient in zip(parameters, found, strict=True)
        ]
        return mean_across_processes(self._trainer.accelerator, gradients)

    def add_gradients(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        """Onto `.grad`, with the loss scale of fp16."""
        scale = self._loss_scale()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            scaled = (gradient * scale).to(parameter.dtype)
            parameter.grad = scaled if parameter.grad is None else parameter.grad + scaled

    def _loss_scale(self) -> float:
        scaler = self._trainer.accelerator.scaler
        if scaler is None:
            return 1.0
        return float(scaler.scale(torch.ones((), device=self._trainer.args.device)))

    def _forward(self, batch: Batch, num_items: Tensor | int | None) -> Tensor:
        self._model.train()
        with self._answers(self._trainer._prepare_inputs(dict(batch))) as inputs:
            return self._trainer.auxiliary_loss(self._model, inputs, num_items)

    def _answers(self, batch: Batch, *, logits: bool = False) -> contextlib.AbstractContextManager[Batch]:
        head = self._trainer.answer_head
        return contextlib.nullcontext(batch) if head is None else answers_only(head, batch, logits=logits)

    @contextlib.contextmanager
    def auxiliary(self, *, replay: bool = True) -> Iterator[None]:
        """Without synchronisation."""
        device = self._trainer.args.device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=replay), self._trainer.accelerator.no_sync(self._model):
            yield

    def frozen(self, parameters: Sequence[nn.Parameter]) -> contextlib.AbstractContextManager[None]:
        """By flag."""
        return activations.frozen(parameters)

    def mean_across_processes(self, values: Tensor) -> Tensor:
        """By reduction."""
        return mean_across_processes(self._trainer.accelerator, [values])[0]

    def number(self, index: int) -> int:
        """Processes take turns, as the trainer's sampler deals batches out."""
        accelerator = self._trainer.accelerator
        return int(index * accelerator.num_processes + accelerator.process_index)
