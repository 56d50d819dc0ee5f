"""A host without a trainer: plain forward and backward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tvac_plugin import activations
from tvac_plugin.defenses.base import Batch, Outputs


class DirectHost:
    """`defenses.base.Host` over a bare model; counts its passes."""

    def __init__(self, model: nn.Module, probe: Sequence[Batch] = (), *, streams: dict[str, Any] | None = None) -> None:
        self.model = model
        self.streams: dict[str, Any] = {"probe": probe, **(streams or {})}
        self.passes: list[str] = []

    def _loss(self, batch: Batch) -> Tensor:
        outputs = self.model(**batch)
        if outputs.logits.dtype != torch.float64:
            return outputs.loss
        # transformers takes its loss in float32
        return cross_entropy(outputs.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    def loss(self, batch: Batch) -> Tensor:
        self.passes.append("loss")
        return self._loss(batch)

    def train(self, batch: Batch) -> Tensor:
        self.passes.append("train")
        loss = self._loss(batch)
        loss.backward()
        return loss.detach()

    def batch(self, stream: str, index: int) -> Any:
        return self.streams[stream][index % len(self.streams[stream])]

    pair = batch

    def has(self, stream: str) -> bool:
        return stream in self.streams

    def mean_loss(self, batch: Batch) -> Tensor:
        self.passes.append("mean_loss")
        return self._loss(batch)

    def outputs(self, batch: Batch, *, hidden_states: bool = False) -> Outputs:
        self.passes.append("outputs")
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        outputs = self.model(**inputs, use_cache=False, output_hidden_states=hidden_states)
        return Outputs(outputs.logits, tuple(outputs.hidden_states or ()))

    def gradients(self, loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        found = torch.autograd.grad(loss, list(parameters), allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]

    def add_gradients(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    @contextlib.contextmanager
    def auxiliary(self, *, replay: bool = True) -> Iterator[None]:
        with torch.random.fork_rng([], enabled=replay):
            yield

    def frozen(self, parameters: Sequence[nn.Parameter]) -> contextlib.AbstractContextManager[None]:
        return activations.frozen(parameters)

    def mean_across_processes(self, values: Tensor) -> Tensor:
        return values

    def number(self, index: int) -> int:
        return index
