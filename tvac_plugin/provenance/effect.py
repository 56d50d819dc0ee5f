"""What a defense is measured to have done to a model, and whether that is enough to call the model defended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tvac_plugin.defenses.base import Position, StepReport
from tvac_plugin.model.weights import fingerprints, num_not_finite, sampled
from tvac_plugin.provenance.manifest import LEAST_MOVED, MOST_IDLE


class Effect:
    """Counts the steps in which the defense did something, and looks at the weights before and after."""

    def __init__(self) -> None:
        """Starts with nothing measured."""
        self.num_steps = self.num_fired = self.num_measured = 0
        self._num_idle = torch.zeros((), dtype=torch.long)
        self._num_defended = torch.zeros((), dtype=torch.long)
        self._this_step = torch.zeros((), dtype=torch.bool)
        self._first: list[str] = []
        self._first_values: list[float] = []
        self._last: list[str] | None = None
        self._changed_after = False
        self._moved: int | None = None
        self._moved_share = 0.0
        self._not_finite = 0

    def start(self, weights: Sequence[nn.Parameter]) -> None:
        """Remembers the trainable weights as they are before training."""
        self._first, self._first_values = fingerprints(weights), sampled(weights)

    def add(self, report: StepReport, position: Position) -> None:
        """Takes in one micro-batch; nothing is read from the device."""
        self.num_steps += position.starts_step
        self.num_fired += report.num_fired
        if position.starts_step:
            self._num_defended = self._num_defended + self._this_step
            self._this_step = torch.zeros_like(self._this_step)
        if report.idle is None:
            return
        self.num_measured += 1
        self._num_idle = self._num_idle.to(report.idle.device) + report.idle
        self._num_defended = self._num_defended.to(report.idle.device)
        self._this_step = self._this_step.to(report.idle.device) | ~report.idle

    def look(self, weights: Sequence[nn.Parameter], *, is_last: bool = False) -> None:
        """Compares the trainable weights with those before training.

        Args:
            weights: As they are now.
            is_last: Whether training ends here; what is looked at later must be the same.
        """
        found = fingerprints(weights)
        self._last = found if is_last else self._last
        self._changed_after = self._last is not None and found != self._last
        self._moved = sum(now != first for now, first in zip(found, self._first, strict=False))
        values = list(zip(sampled(weights), self._first_values, strict=False))
        self._moved_share = sum(now != first for now, first in values) / max(len(values), 1)
        self._not_finite = num_not_finite(weights)

    def problems(self) -> list[str]:
        """Why the model must not be called defended; empty where it may."""
        num_idle = int(self._num_idle)
        if self.num_measured == 0:
            return [f"in {self.num_steps} steps the defense measured no effect of its own"]
        problems = []
        if num_idle > MOST_IDLE * self.num_measured:
            problems.append(
                f"in {num_idle} of {self.num_measured} batches the defense did nothing, because what it would have "
                f"added was zero, not finite or lost in rounding; at most {MOST_IDLE:.0%} may be so"
            )
        if self._changed_after:
            problems.append("the weights were changed after the training, without the defense")
        if self._moved is None:
            problems.append("the weights were not looked at after training")
        elif self._moved == 0:
            problems.append(f"none of {len(self._first)} trained tensors differs from what it was before training")
        elif self._moved_share < LEAST_MOVED:
            problems.append(
                f"{self._moved_share:.2%} of the trained weights differ from what they were before training, and at "
                f"least {LEAST_MOVED:.0%} must: the steps are too small for the weights' number format"
            )
        if self._not_finite:
            problems.append(f"{self._not_finite} of {len(self._first)} trained tensors hold values that are not finite")
        return problems

    def facts(self) -> dict[str, Any]:
        """What the manifest says."""
        return {
            "steps": self.num_steps,
            "defended_steps": int(self._num_defended + self._this_step),
            "hook_fires": self.num_fired,
            "measured_batches": self.num_measured,
            "idle_batches": int(self._num_idle),
            "trained_tensors": len(self._first),
            "moved_tensors": self._moved,
            "moved_share": self._moved_share,
        }

    def state_dict(self) -> dict[str, Any]:
        """The counts so far and the first weights, as JSON values."""
        return {
            "num_steps": self.num_steps,
            "num_fired": self.num_fired,
            "num_measured": self.num_measured,
            "num_idle": int(self._num_idle),
            "num_defended": int(self._num_defended),
            "this_step": bool(self._this_step),
            "first_weights": self._first,
            "first_values": self._first_values,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.num_steps, self.num_fired = state["num_steps"], state["num_fired"]
        self.num_measured = state["num_measured"]
        self._num_idle, self._num_defended = torch.tensor(state["num_idle"]), torch.tensor(state["num_defended"])
        self._this_step = torch.tensor(state["this_step"])
        self._first, self._first_values = list(state["first_weights"]), list(state["first_values"])
