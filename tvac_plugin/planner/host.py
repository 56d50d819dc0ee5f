"""The trainer's side of the seam in `tvac_plugin.defenses.base`, on fake tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn

from tvac_plugin.configs.base import Stream
from tvac_plugin.defenses.testing import PlainHost
from tvac_plugin.model.answer_head import AnswerHead, answers_only
from tvac_plugin.model.types import Batch, Pair
from tvac_plugin.planner.ledger import Ledger
from tvac_plugin.planner.workload import Workload


class PlannedHost(PlainHost):
    """A plain host with the workload's precision and accumulation; tells a ledger where it is."""

    def __init__(
        self,
        model: Any,
        workload: Workload,
        ledger: Ledger,
        *,
        stream_sizes: Mapping[str, Stream],
        data_keys: Set[str],
        answer_head: AnswerHead | None,
    ) -> None:
        """Runs `model`.

        Args:
            model: A fake model.
            workload: Sizes and precision.
            ledger: Told which part of the pass is going on.
            stream_sizes: Data that the defense reads beside the training batches.
            data_keys: Keys under which the recipe names data.
            answer_head: The head, if it leaves out the prompt's tokens.
        """
        super().__init__(model)
        self._workload = workload
        self._ledger = ledger
        self._stream_sizes = stream_sizes
        self._data_keys = data_keys
        self._answer_head = answer_head
        self._forward = torch.autocast("cpu", dtype=workload.dtype)(model) if workload.autocast else model
        self._forward = convert_outputs_to_fp32(self._forward) if workload.autocast else self._forward

    @contextlib.contextmanager
    def told_apart(self) -> Iterator[None]:
        """Inside it the head and the loss, forward and backward, are counted as such."""
        head = self.model.get_output_embeddings()

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

    def _run(self, inputs: Mapping[str, Any], **options: Any) -> Any:
        self._ledger.making = "temporary"
        return self._forward(**inputs, use_cache=False, **options)

    def _mean_loss(self, batch: Batch) -> Tensor:
        head = self._answer_head
        with contextlib.nullcontext(batch) if head is None else answers_only(head, batch, logits=False) as inputs:
            loss = self._run(inputs)["loss"]
        assert isinstance(loss, Tensor)
        return loss

    def loss(self, batch: Batch, *, of: Batch | None = None) -> Tensor:
        """Scaled for the micro-batches of a step."""
        return self._mean_loss(batch) / self._workload.accumulation

    def batch(self, stream: str, index: int) -> Batch:
        """A batch of the stream's size, each of its rows as long as a training row."""
        return self.fake_batch(self._stream_sizes[stream].batch_size)

    def pair(self, stream: str, index: int) -> Pair:
        """Two such batches."""
        return Pair(self.batch(stream, index), self.batch(stream, index))

    def has(self, stream: str) -> bool:
        """Whether the recipe names its data."""
        return self._stream_sizes[stream].key in self._data_keys

    def add_gradients(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        """Onto `.grad`, which are gradients then."""
        super().add_gradients(parameters, gradients)
        self._ledger.own([parameter.grad for parameter in parameters if parameter.grad is not None], "gradients")

    @contextlib.contextmanager
    def auxiliary(self, *, replay: bool = True) -> Iterator[None]:
        """There is nothing random in fake tensors."""
        yield
