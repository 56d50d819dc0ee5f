"""A host without a trainer: plain forward and backward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from tvac_plugin import activations
from tvac_plugin.defenses.base import Batch


class DirectHost:
    """`defenses.base.Host` over a bare model; counts its passes."""

    def __init__(self, model: nn.Module, harmful: Sequence[Batch] = ()) -> None:
        self.model = model
        self.harmful = harmful
        self.passes: list[str] = []

    def loss(self, batch: Batch) -> Tensor:
        self.passes.append("loss")
        return self.model(**batch).loss

    def train(self, batch: Batch) -> Tensor:
        self.passes.append("train")
        loss = self.model(**batch).loss
        loss.backward()
        return loss.detach()

    def harmful_batch(self, index: int) -> Batch:
        return self.harmful[index % len(self.harmful)]

    def harmful_loss(self, batch: Batch) -> Tensor:
        self.passes.append("harmful_loss")
        return self.model(**batch).loss

    @contextlib.contextmanager
    def auxiliary(self) -> Iterator[None]:
        with torch.random.fork_rng([]):
            yield

    def frozen(self, parameters: Sequence[nn.Parameter]) -> contextlib.AbstractContextManager[None]:
        return activations.frozen(parameters)

    def mean_across_processes(self, values: Tensor) -> Tensor:
        return values
