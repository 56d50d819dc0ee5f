"""The trainer's side of the seam in `tvac_plugin.defenses.base`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainingArguments

from tvac_plugin.data.streams import Streams
from tvac_plugin.defenses.base import trainable
from tvac_plugin.model import hooks
from tvac_plugin.model.answer_head import AnswerHead, answers_only
from tvac_plugin.model.numerics import norm, precise
from tvac_plugin.model.types import Batch, Outputs, Pair
from tvac_plugin.trainers.reduction import average_gradients, mean_across_processes


class DefendedTrainer(Protocol):
    """What the host needs of `trainers.mixin.SafetyDefenseMixin`, where each is described."""

    accelerator: Accelerator
    args: TrainingArguments
    streams: Streams | None
    answer_head: AnswerHead | None
    reads_logits: bool
    model_accepts_loss_kwargs: bool
    compute_loss_func: Any
    current_gradient_accumulation_steps: int

    def host_step(self, model: nn.Module, batch: Batch, num_items: Tensor | int | None) -> Tensor:
        """The host trainer's own step."""

    def auxiliary_loss(self, model: nn.Module, batch: Batch, num_items: Tensor | int | None) -> Tensor:
        """Loss of a pass that no metric sees."""

    def compute_loss_context_manager(self) -> contextlib.AbstractContextManager[Any]:
        """The trainer's precision."""

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Puts a batch on the device."""


class TrainerHost:
    """`defenses.base.Host` for one micro-batch of a trainer; its methods are described there."""

    def __init__(self, trainer: DefendedTrainer, model: nn.Module, num_items: Tensor | int | None) -> None:
        self._trainer = trainer
        self._model = model
        self._num_items = num_items
        self._added_norm: Tensor | None = None
        self._added_to: Sequence[nn.Parameter] = ()
        assert trainer.streams is not None, "the defense was not configured"
        self._streams = trainer.streams

    def loss(self, batch: Batch, *, of: Batch | None = None) -> Tensor:
        """As `train`, with its graph."""
        trainer = self._trainer
        num_items = self._num_items
        if num_items is not None and of is not None and of is not batch:
            num_items = torch.as_tensor(num_items) * max(1, _num_targets(batch)) / max(1, _num_targets(of))
        loss = self._forward(batch, num_items)
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
        found: Sequence[Tensor | None] = [None for _ in parameters]
        if loss.requires_grad:
            found = torch.autograd.grad(loss * scale, list(parameters), allow_unused=True)
        gradients = [
            torch.zeros_like(parameter) if gradient is None else gradient / scale
            for parameter, gradient in zip(parameters, found, strict=True)
        ]
        return mean_across_processes(self._trainer.accelerator, gradients)

    def output_gradients(self, loss: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Through the loss scale of fp16, in float32 then: what is scaled up for fp16 may be too small for it after."""
        scale = self._loss_scale()
        found = torch.autograd.grad(loss * scale if scale != 1 else loss, list(outputs))
        return [gradient if scale == 1 else precise(gradient) / scale for gradient in found]

    def add_gradients(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        """Onto `.grad`, with the loss scale of fp16."""
        scale = self._loss_scale()
        self._added_norm, self._added_to = norm(gradients) * scale, parameters
        for parameter, gradient in zip(parameters, gradients, strict=True):
            scaled = (gradient * scale).to(parameter.dtype)
            parameter.grad = scaled if parameter.grad is None else parameter.grad + scaled

    def lost(self) -> Tensor | None:
        """Whether what was added is below the precision of the gradients; `None` where nothing was added."""
        if self._added_norm is None:
            return None
        precision = min(torch.finfo(parameter.dtype).eps for parameter in self._added_to) / 2
        whole = norm([parameter.grad for parameter in self._added_to if parameter.grad is not None])
        return self._added_norm < precision * whole

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
        return hooks.frozen(parameters)

    def mean_across_processes(self, values: Tensor) -> Tensor:
        """By reduction."""
        return mean_across_processes(self._trainer.accelerator, [values])[0]

    def number(self, index: int) -> int:
        """Processes take turns, as the trainer's sampler deals batches out."""
        accelerator = self._trainer.accelerator
        return int(index * accelerator.num_processes + accelerator.process_index)


def _num_targets(batch: Batch) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())
