"""The `safety/*` metrics between two logs of the trainer."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tvac_plugin.defenses.base import StepReport

IDLE = "safety/idle_batches"


class StepMetrics:
    """Averages reports over processes and the optimizer steps since the last log; reads the device once per log.

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
        if report.idle is not None:
            self._idle.append(report.idle)

    def pop(self, mean_across_processes: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Returns the metrics and starts anew; empty when no step was taken.

        Args:
            mean_across_processes: Averages one tensor; called on every process or on none.
        """
        if not self._num_batches:
            return {}
        num_steps = max(1, self._num_steps)
        measured = {name: _total(losses) / num_steps for name, losses in self._losses.items()}
        measured |= {name: _total(norms) / len(norms) for name, norms in self._norms.items()}
        metrics: dict[str, float] = {}
        if measured:
            means = mean_across_processes(_stacked(list(measured.values()))).tolist()
            metrics = {f"safety/{name}": mean for name, mean in zip(measured, means, strict=True)}
        if self._entropies:
            metrics["safety/probe_entropy"] = self._entropies[-1]
        if num_idle := float(_total(self._idle)):
            metrics[IDLE] = num_idle
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
        self._idle: list[Tensor] = []
        self._drawn: Counter[int] = Counter()

    def state_dict(self) -> dict[str, Any]:
        """What was taken in since the last log, as JSON values."""
        return {
            "num_steps": self._num_steps,
            "num_batches": self._num_batches,
            "losses": {name: _floats(losses) for name, losses in self._losses.items()},
            "norms": {name: _floats(norms) for name, norms in self._norms.items()},
            "entropies": self._entropies[-1:],
            "idle": _floats(self._idle),
            "drawn": sorted(self._drawn.items()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned; the next `pop` gives what it would have given."""
        self._reset()
        self._num_steps = state["num_steps"]
        self._num_batches = state["num_batches"]
        self._losses.update({name: list(torch.tensor(losses)) for name, losses in state["losses"].items()})
        self._norms.update({name: list(torch.tensor(norms)) for name, norms in state["norms"].items()})
        self._entropies = list(state["entropies"])
        self._idle = list(torch.tensor(state["idle"]))
        self._drawn = Counter(dict(state["drawn"]))


def _total(values: list[Tensor]) -> Tensor:
    return _stacked(values).sum()


def _floats(values: list[Tensor]) -> list[float]:
    floats: list[float] = _stacked(values).tolist()
    return floats


def _stacked(values: list[Tensor]) -> Tensor:
    return torch.stack([value.float().to(values[0].device) for value in values]) if values else torch.zeros(0)
