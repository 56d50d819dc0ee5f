"""The `safety/*` metrics between two logs of the trainer."""

from __future__ import annotations

from collections import Counter, defaultdict

import torch
from torch import Tensor

from tvac_plugin.defenses.base import StepReport


class StepMetrics:
    """Averages reports over the optimizer steps since the last log; reads the device once per log.

    Losses of the micro-batches of one step add up, as in the trainer's own `loss`; norms are averaged
    over the micro-batches that have them.
    """

    def __init__(self) -> None:
        """Starts empty."""
        self._reset()

    def add(self, report: StepReport, *, starts_step: bool) -> None:
        """Takes in one micro-batch."""
        self._num_steps += starts_step
        for name, loss in report.losses.items():
            self._losses[name].append(loss)
        for name, norm in report.norms.items():
            self._norms[name].append(norm)
        self._num_batches += 1
        self._drawn.update(report.active_layers)
        self._entropies += [event["entropy"] for event in report.events if "entropy" in event]

    def pop(self) -> dict[str, float]:
        """Returns the metrics and starts anew; empty when no step was taken."""
        if not self._num_batches:
            return {}
        num_steps = max(1, self._num_steps)
        metrics = {f"safety/{name}": _total(losses) / num_steps for name, losses in self._losses.items()}
        metrics |= {f"safety/{name}": _total(norms) / len(norms) for name, norms in self._norms.items()}
        if self._entropies:
            metrics["safety/probe_entropy"] = self._entropies[-1]
        for layer, count in sorted(self._drawn.items()):
            metrics[f"safety/drawn_layer/{layer}"] = count / self._num_batches
        self._reset()
        return {name: round(value, 6) for name, value in metrics.items()}

    def _reset(self) -> None:
        self._num_steps = 0
        self._num_batches = 0
        self._losses: defaultdict[str, list[Tensor]] = defaultdict(list)
        self._norms: defaultdict[str, list[Tensor]] = defaultdict(list)
        self._entropies: list[float] = []
        self._drawn: Counter[int] = Counter()


def _total(values: list[Tensor]) -> float:
    return float(torch.stack([value.float() for value in values]).sum())
