"""The trainer's side of the seam in `tvac_plugin.defenses.base`, on fake tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn

from tvac_plugin import activations
from tvac_plugin.answers import AnswerHead, answers_only
from tvac_plugin.configs.base import Stream
from tvac_plugin.defenses.base import Batch, Outputs, Pair
from tvac_plugin.planner.ledger import Ledger
from tvac_plugin.planner.workload import Workload


class PlannedHost:
    """`defenses.base.Host` as `trainers.host.TrainerHost` is one in a single process; tells a ledger where it is."""

    def __init__(
        self,
        model: Any,
        workload: Workload,
        ledger: Ledger,
        *,
        streams: Mapping[str, Stream],
        data_keys: Set[str],
        answer_head: AnswerHead | None,
    ) -> None:
        """Runs `model`.

        Args:
            model: A fake model.
            workload: Sizes and precision.
            ledger: Told which part of the pass is going on.
            streams: Data that the defense reads beside the training batches.
            data_keys: Keys under which the recipe names data.
            answer_head: The head, if it leaves out the prompt's tokens.
        """
        self._model = model
        self._workload = workload
        self._ledger = ledger
        self._streams = streams
        self._data_keys = data_keys
        self._answer_head = answer_head
        self._forward = torch.autocast("cpu", dtype=workload.dtype)(model) if workload.autocast else model
        self._forward = convert_outputs_to_fp32(self._forward) if workload.autocast else self._forward

    @contextlib.contextmanager
    def told_apart(self) -> Iterator[None]:
        """Inside it the head and the loss, forward and backward, are counted as such."""
        head = self._model.get_output_embeddings()

        def enter(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._ledger.making = "logits_and_loss"
            if inputs[0].requires_grad:
                inputs[0].register_hook(self._leave)

        handle = head.register_forward_pre_hook(enter)
        try:
            yield
        finally:
            handle.remove()

    def _leave(self, _gradient: Tensor) -> None:
        self._ledger.making = "temporary"

    def fake_batch(self, rows: int) -> dict[str, Tensor]:
        """Full rows."""
        ids = torch.empty((rows, self._workload.sequence_len), dtype=torch.long)
        return {"input_ids": ids, "attention_mask": torch.empty_like(ids), "labels": torch.empty_like(ids)}

    def _run(self, batch: Batch, **kwargs: Any) -> Any:
        self._ledger.making = "temporary"
        return self._forward(**batch, use_cache=False, **kwargs)

    def loss(self, batch: Batch) -> Tensor:
        """As `train`, with its graph."""
        return self.mean_loss(batch) / self._workload.accumulation

    def train(self, batch: Batch) -> Tensor:
        """Forward and backward."""
        loss = self.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def batch(self, stream: str, index: int) -> Batch:
        """A batch of the stream's size, each of its rows as long as a training row."""
        return self.fake_batch(self._streams[stream].batch_size)

    def pair(self, stream: str, index: int) -> Pair:
        """Two such batches."""
        return Pair(self.batch(stream, index), self.batch(stream, index))

    def has(self, stream: str) -> bool:
        """Whether the recipe names its data."""
        return self._streams[stream].key in self._data_keys

    def mean_loss(self, batch: Batch) -> Tensor:
        """The model's own loss."""
        with self._answers(batch) as inputs:
            loss = self._run(inputs)["loss"]
        assert isinstance(loss, Tensor)
        return loss

    def _answers(self, batch: Batch) -> contextlib.AbstractContextManager[Batch]:
        if self._answer_head is None:
            return contextlib.nullcontext(batch)
        return answers_only(self._answer_head, batch, logits=False)

    def outputs(self, batch: Batch, *, hidden_states: bool = False) -> Outputs:
        """Forward pass."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        outputs = self._run(inputs, output_hidden_states=hidden_states)
        return Outputs(outputs["logits"], tuple(outputs.get("hidden_states") or ()))

    def gradients(self, loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Zero where the loss does not depend on a parameter."""
        found = torch.autograd.grad(loss, list(parameters), allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]

    def add_gradients(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        """Onto `.grad`."""
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            self._ledger.own([parameter.grad], "gradients")

    @contextlib.contextmanager
    def auxiliary(self, *, replay: bool = True) -> Iterator[None]:
        """There is nothing random in fake tensors."""
        yield

    def frozen(self, parameters: Sequence[nn.Parameter]) -> contextlib.AbstractContextManager[None]:
        """By flag."""
        return activations.frozen(parameters)

    def number(self, index: int) -> int:
        """Of one process."""
        return index

    def mean_across_processes(self, values: Tensor) -> Tensor:
        """There is one process."""
        return values
