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
from tvac_plugin.model.types import Batch, Outputs, Pair

TINY = 1e-12
"""A gradient or perturbation of this norm does nothing."""


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


class Host(Protocol):
    """What a defense may ask of the trainer.

    Losses of auxiliary passes are means over the labelled tokens of their batch; `gradients` are means over all
    training processes.
    """

    def loss(self, batch: Batch, *, of: Batch | None = None) -> Tensor:
        """Mean cross-entropy on `batch`, scaled as `train` scales it, with its autograd graph.

        Args:
            batch: What to compute it on.
            of: The micro-batch that `batch` is a part of and stands for, so that both have one scale.
        """

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

    def output_gradients(self, loss: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of `loss` at outputs of modules, on this process alone."""

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


class StepKind(NamedTuple):
    """A kind of micro-batch, for those who count what a step costs.

    Attributes:
        share: How many of all micro-batches are of this kind; the shares of all kinds add up to 1.
        config: The settings to take it with.
        position: Where training stands.
        state: The defense's state at that moment, as `state_dict` gives it; `None` for the first one.
        place: Kinds with a place lie on a line: place 0 costs most, and from 1 on cost may change evenly.
    """

    share: float
    config: DefenseConfig
    position: Position
    state: Mapping[str, Any] | None = None
    place: int | None = None


@dataclass
class StepReport:
    """What one micro-batch did.

    Attributes:
        loss: The detached training loss, what the trainer returns for this micro-batch.
        losses: Other losses on the scale of `loss`, by name; summed over the micro-batches of a step.
        norms: L2 norms by name: of a perturbation, or of a gradient that was added. Empty where nothing was due.
        effect: The norm that says whether the defense did anything, if not all of `norms` do.
        lost: Whether rounding took what was added to the gradients, as a scalar; the host sets it where it can tell.
        active_layers: Indices of the layers perturbed.
        num_fired: How many layers really received their perturbation.
        events: What to write to the trace, if anything happened.
    """

    loss: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    effect: Tensor | None = None
    lost: Tensor | None = None
    active_layers: tuple[int, ...] = ()
    num_fired: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def idle(self) -> Tensor | None:
        """Whether the defense did nothing where something was due, as a scalar; `None` where nothing was."""
        norms = list(self.norms.values()) if self.effect is None else [self.effect]
        if not norms:
            return None
        sizes = torch.stack([norm.detach().float() for norm in norms])
        is_idle = ((sizes < TINY) | ~sizes.isfinite()).all()
        return is_idle if self.lost is None else is_idle | self.lost


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

    @classmethod
    def step_kinds(
        cls, config: Any, num_layers: int, *, accumulation: int, probes: Sequence[Sequence[float]] = ()
    ) -> list[StepKind]:
        """What kinds of micro-batches there are; by default the first one stands for all.

        Args:
            config: An instance of `config_class`.
            num_layers: Decoder layers of the model.
            accumulation: Micro-batches of an optimizer step.
            probes: Probabilities of all layers, for each probe of an earlier run, where settings have `draws_layers`.
        """
        return [StepKind(1.0, config, Position(0, starts_step=True))]

    @classmethod
    def state_with(cls, layers: Sequence[int]) -> dict[str, Any] | None:
        """The state in which `layers` stay drawn until a probe, where probes alone draw; `None` elsewhere."""
        return None

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
