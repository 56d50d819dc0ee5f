"""The `safety/*` metrics between two logs of the trainer."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from tvac_plugin.defenses.base import StepReport


class StepMetrics:
    """Averages reports over the optimizer steps since the last log; reads the device once per log.

    Losses of the micro-batches of one step add up, as in the trainer's own `loss`; norms are averaged.
    """

    def __init__(self) -> None:
        """Starts empty."""
        self._reset()

    def add(self, report: StepReport, *, starts_step: bool) -> None:
        """Takes in one micro-batch."""
        self._num_steps += starts_step
        self._clean.append(report.clean_loss)
        self._perturbed.append(report.loss)
        self._norms.append(report.perturbation_norm)
        self._drawn.update(report.active_layers)
        self._entropies += [event["entropy"] for event in report.events if "entropy" in event]

    def pop(self) -> dict[str, float]:
        """Returns the metrics and starts anew; empty when no step was taken."""
        if not self._norms:
            return {}
        num_batches, num_steps = len(self._norms), max(1, self._num_steps)
        metrics = {
            "safety/clean_loss": _total(self._clean) / num_steps,
            "safety/perturbed_loss": _total(self._perturbed) / num_steps,
            "safety/perturbation_norm": _total(self._norms) / num_batches,
        }
        if self._entropies:
            metrics["safety/probe_entropy"] = self._entropies[-1]
        for layer, count in sorted(self._drawn.items()):
            metrics[f"safety/drawn_layer/{layer}"] = count / num_batches
        self._reset()
        return {name: round(value, 6) for name, value in metrics.items()}

    def _reset(self) -> None:
        self._num_steps = 0
        self._clean: list[Tensor] = []
        self._perturbed: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._entropies: list[float] = []
        self._drawn: Counter[int] = Counter()


def _total(values: list[Tensor]) -> float:
    return float(torch.stack([value.float() for value in values]).sum())
