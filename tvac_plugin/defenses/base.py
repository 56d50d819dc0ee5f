"""The seam between a defense and whatever trains the model.

A defense sees a model, batches, and a `Host` that computes losses and runs backward. It never sees a
trainer, a configuration dictionary or an optimizer, so it can be read, tested and reused without them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from tvac_plugin.configs.base import DefenseConfig

Batch = Mapping[str, Any]
"""Model inputs with `labels`; tensors of shape [batch, sequence]."""


class Position(NamedTuple):
    """Where training stands.

    Attributes:
        step: Optimizer steps taken so far.
        starts_step: Whether this is the first micro-batch of the optimizer step.
        num_steps: Optimizer steps of the whole training.
    """

    step: int
    starts_step: bool
    num_steps: int = 0


class Outputs(NamedTuple):
    """What a forward pass gives.

    Attributes:
        logits: [batch, sequence, vocabulary].
        hidden_states: The residual stream before each layer and, normed, after the last; each
            [batch, sequence, hidden]. Empty unless asked for.
    """

    logits: Tensor
    hidden_states: tuple[Tensor, ...] = ()


class Pair(NamedTuple):
    """The same prompts answered twice, padded on the right to one length.

    Attributes:
        first: Rows of the stream's own key, the harmful answers.
        second: Rows of the key it is paired with, the refusals.
    """

    first: Batch
    second: Batch


class Host(Protocol):
    """What a defense may ask of the trainer.

    Losses of auxiliary passes are means over the labelled tokens of their batch; `gradients` are means over all
    training processes.
    """

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy on `batch`, scaled as `train` scales it, with its autograd graph."""

    def train(self, batch: Batch) -> Tensor:
        """Forward and backward on `batch`; adds to the parameters' gradients and returns the detached loss.

        The gradients are this process's; they are averaged over all processes once, after the defense's step.
        """

    def batch(self, stream: str, index: int) -> Batch:
        """The `index`-th batch of a stream of the settings; the same index always gives the same batch."""

    def pair(self, stream: str, index: int) -> Pair:
        """The `index`-th batch of a paired stream."""

    def has(self, stream: str) -> bool:
        """Whether an optional stream was given data."""

    def mean_loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy on any batch, with its autograd graph; metrics are left alone."""

    def outputs(self, batch: Batch, *, hidden_states: bool = False) -> Outputs:
        """Forward pass on `batch` without its labels, with its autograd graph."""

    def gradients(self, loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Gradients of `loss`, zero where it does not depend on a parameter; no `.grad` changes."""

    def add_gradients(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        """Adds to the gradient of this optimizer step, once and whole, whatever the accumulation."""

    def auxiliary(self, *, replay: bool = True) -> AbstractContextManager[None]:
        """Around passes other than `train`: no gradient synchronisation; with `replay` random state is put back after.

        Passes in contexts of their own, and a `train` after them, then see the same dropout masks.
        """

    def frozen(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """Inside it `parameters` collect no gradient."""

    def mean_across_processes(self, values: Tensor) -> Tensor:
        """Averages `values` over all training processes."""

    def number(self, index: int) -> int:
        """The number of this process's `index`-th batch among those of all processes; seeds what differs by batch."""


@dataclass
class StepReport:
    """What one micro-batch did.

    Attributes:
        loss: The detached training loss, what the trainer returns for this micro-batch.
        losses: Other losses on the scale of `loss`, by name; summed over the micro-batches of a step.
        norms: L2 norms of what the defense did, by name: a perturbation, or a gradient it added. If all are zero or
            not finite it did nothing. Empty where nothing was due.
        active_layers: Indices of the layers perturbed.
        num_fired: How many layers really received their perturbation.
        events: What to write to the trace, if anything happened.
    """

    loss: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    active_layers: tuple[int, ...] = ()
    num_fired: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def idle(self) -> Tensor | None:
        """Whether the defense did nothing where something was due, as a scalar; `None` where nothing was."""
        if not self.norms:
            return None
        norms = torch.stack([norm.detach().float() for norm in self.norms.values()])
        return ((norms == 0) | ~norms.isfinite()).all()


class Defense(ABC):
    """One defense, bound to one model.

    A subclass names the class of its settings in `config_class`, and takes `(config, model, *, seed)`.
    """

    config_class: ClassVar[type[DefenseConfig]]

    @abstractmethod
    def __init__(self, config: Any, model: nn.Module, *, seed: int) -> None:
        """Binds the defense to `model`, before any training or resuming; changes nothing in it.

        Args:
            config: An instance of `config_class`.
            model: The model without the trainer's wrappers.
            seed: Everything random must depend on it and on the step alone, or be in `state_dict`.
        """

    @abstractmethod
    def step(self, host: Host, batch: Batch, position: Position) -> StepReport:
        """Computes the defended gradient of one micro-batch; leaves hooks and flags as it found them."""

    def state_dict(self) -> dict[str, Any]:
        """Whatever decides the next step: JSON values, and tensors at the top level."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - a defense may have no state
        """Restores what `state_dict` returned."""


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that learn."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
