"""The seam between a defense and whatever trains the model.

A defense sees a model, batches, and a `Host` that computes losses and runs backward. It never sees a
trainer, a configuration dictionary or an optimizer, so it can be read, tested and reused without them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

Batch = Mapping[str, Any]
"""Model inputs with `labels`; tensors of shape [batch, sequence]."""


class Position(NamedTuple):
    """Where training stands.

    Attributes:
        step: Optimizer steps taken so far.
        starts_step: Whether this is the first micro-batch of the optimizer step.
    """

    step: int
    starts_step: bool


class Host(Protocol):
    """What a defense may ask of the trainer."""

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy on `batch`, scaled as `train` scales it, with its autograd graph."""

    def train(self, batch: Batch) -> Tensor:
        """Forward and backward on `batch`; adds to the parameters' gradients and returns the detached loss."""

    def harmful_batch(self, index: int) -> Batch:
        """The `index`-th batch of harmful examples; the same index always gives the same batch."""

    def harmful_loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy on a harmful batch, with its autograd graph; metrics are left alone."""

    def auxiliary(self) -> AbstractContextManager[None]:
        """Around passes that must leave no trace: no gradient synchronisation, random state put back after."""

    def frozen(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """Inside it `parameters` collect no gradient."""

    def mean_across_processes(self, values: Tensor) -> Tensor:
        """Averages `values` over all training processes."""


@dataclass
class StepReport:
    """What one micro-batch did.

    Attributes:
        loss: The detached training loss, what the trainer returns for this micro-batch.
        clean_loss: Loss before the perturbation, on the scale of `loss`.
        perturbation_norm: L2 norm of the perturbation over the whole micro-batch and all perturbed layers.
        active_layers: Indices of the layers perturbed.
        num_fired: How many layers really received their perturbation.
        events: What to write to the trace: probes and draws, if any happened.
    """

    loss: Tensor
    clean_loss: Tensor
    perturbation_norm: Tensor
    active_layers: tuple[int, ...]
    num_fired: int
    events: list[dict[str, Any]] = field(default_factory=list)


class Defense(ABC):
    """One alignment-stage defense, bound to one model."""

    @abstractmethod
    def step(self, host: Host, batch: Batch, position: Position) -> StepReport:
        """Computes the defended gradient of one micro-batch; leaves hooks and flags as it found them."""

    def state_dict(self) -> dict[str, Any]:
        """Whatever decides the next step, as JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - a defense may have no state
        """Restores what `state_dict` returned."""
