"""A host without a trainer, to step a defense on a small model in a test of its own.

Example:
    host = PlainHost(model, {"harmful": [harmful_batch]})
    report = MyDefense(MyConfig(), model, seed=0).step(host, batch, Position(step=0, starts_step=True))
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tvac_plugin.model import hooks
from tvac_plugin.model.types import Batch, Outputs, Pair


class PlainHost:
    """`defenses.base.Host` over a bare model in one process: plain forward and backward, no loss scale, no trainer."""

    def __init__(self, model: nn.Module, streams: Mapping[str, Sequence[Batch | Pair]] | None = None) -> None:
        """Runs `model`.

        Args:
            model: Takes batches as keyword arguments and returns transformers' outputs.
            streams: Batches, or pairs of them, by the name under which the defense asks for them; taken in turns.
        """
        self.model: Any = model
        self.streams = dict(streams or {})

    def _run(self, inputs: Mapping[str, Any], **options: Any) -> Any:
        return self.model(**inputs, use_cache=False, **options)

    def _mean_loss(self, batch: Batch) -> Tensor:
        outputs = self._run(batch)
        loss: Tensor = outputs["loss"]
        if outputs["logits"].dtype == torch.float64:  # transformers takes its loss in float32
            loss = cross_entropy(outputs["logits"][:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        return loss

    def loss(self, batch: Batch, *, of: Batch | None = None) -> Tensor:
        """Mean cross-entropy, whatever the batch is a part of."""
        return self._mean_loss(batch)

    def train(self, batch: Batch) -> Tensor:
        """Forward and backward."""
        loss = self.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def batch(self, stream: str, index: int) -> Batch:
        """A batch of the stream."""
        return self._item(stream, index)  # type: ignore[no-any-return]

    def pair(self, stream: str, index: int) -> Pair:
        """A pair of the stream."""
        return self._item(stream, index)  # type: ignore[no-any-return]

    def _item(self, stream: str, index: int) -> Any:
        return self.streams[stream][index % len(self.streams[stream])]

    def has(self, stream: str) -> bool:
        """Whether the stream was given."""
        return stream in self.streams

    def mean_loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy."""
        return self._mean_loss(batch)

    def outputs(self, batch: Batch, *, hidden_states: bool = False) -> Outputs:
        """Forward pass."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        outputs = self._run(inputs, output_hidden_states=hidden_states)
        return Outputs(outputs["logits"], tuple(outputs.get("hidden_states") or ()))

    def gradients(self, loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Zero where the loss does not depend on a parameter."""
        if not loss.requires_grad:
            return [torch.zeros_like(parameter) for parameter in parameters]
        found = torch.autograd.grad(loss, list(parameters), allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]

    def output_gradients(self, loss: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
        """As autograd gives them."""
        return list(torch.autograd.grad(loss, list(outputs)))

    def add_gradients(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        """Onto `.grad`."""
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    @contextlib.contextmanager
    def auxiliary(self, *, replay: bool = True) -> Iterator[None]:
        """With the random state put back, if it is to be."""
        with torch.random.fork_rng([], enabled=replay):
            yield

    def frozen(self, parameters: Sequence[nn.Parameter]) -> contextlib.AbstractContextManager[None]:
        """By flag."""
        return hooks.frozen(parameters)

    def mean_across_processes(self, values: Tensor) -> Tensor:
        """There is one process."""
        return values

    def number(self, index: int) -> int:
        """Of one process."""
        return index
