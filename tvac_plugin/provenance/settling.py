"""Whether a training ended after its losses had settled, told from the trainer's log.

A loss that falls exponentially, and of whose fall the last tenth of the run brought 3 %, has covered about nine tenths
of its way. A schedule that ends at a learning rate of zero makes every loss settle. So this tells that a training
stopped too early, and not that it went on for long enough.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, variance
from typing import Any, NamedTuple

LEAST_LOGGED = 20
"""With fewer logged losses a tenth is one value, whose noise is not known."""
MOST_CHANGE = 0.03
"""Largest part of the fall of a loss that may still come between the last two tenths of its logged values."""
MOST_TAKEN_BACK = 0.5
"""Largest part of the fall of the clean loss that the perturbation may take back at the end."""
_SIGMAS = 2.0
_CLEAN, _PERTURBED, _LOSS = "clean_loss", "perturbed_loss", "loss"


class EndOfLoss(NamedTuple):
    """How a loss ended.

    Attributes:
        first: Its first logged value.
        before: Its mean over the last tenth of the logged values but one.
        last: Its mean over the last tenth.
        error: Standard error of the difference of these means.
    """

    first: float
    before: float
    last: float
    error: float

    @property
    def gained(self) -> float:
        """By how much it fell."""
        return max(0.0, self.first - self.last)

    @property
    def has_settled(self) -> bool:
        """Whether the last two tenths are equal, but for noise and a small part of the fall."""
        if not all(math.isfinite(value) for value in self):
            return False
        return abs(self.before - self.last) <= max(MOST_CHANGE * self.gained, _SIGMAS * self.error)


class Settling(NamedTuple):
    """How the losses of a training ended.

    Attributes:
        ends: By name of the loss; empty if too few were logged to tell.
        problems: Why they have not settled; empty if they have.
    """

    ends: dict[str, EndOfLoss]
    problems: list[str]

    @property
    def settled(self) -> bool | None:
        """Whether all losses have settled; `None` where that cannot be told."""
        return not self.problems if self.ends else None

    def facts(self) -> dict[str, Any]:
        """As JSON values; what is not finite is null."""
        ends = {
            name: {key: value if math.isfinite(value) else None for key, value in end._asdict().items()}
            for name, end in self.ends.items()
        }
        return {"settled": self.settled, "unsettled": self.problems, "end_losses": ends}


def settling(log: Sequence[Mapping[str, Any]]) -> Settling:
    """Looks at the training losses in a trainer's `log_history`, or in the lines of a trace.

    A loss has settled if its mean over the last tenth of the logged values differs from that over the tenth before by
    no more than `MOST_CHANGE` of its fall, or by two standard errors. With a perturbation, clean and perturbed loss
    must settle, and end no more than `MOST_TAKEN_BACK` of the clean loss's fall apart.
    """
    entries = [entry for entry in log if _LOSS in entry]
    names = [name for name in (_CLEAN, _PERTURBED) if entries and all(f"safety/{name}" in e for e in entries)]
    series = {name: [_number(e[f"safety/{name}"]) for e in entries] for name in names}
    series = series or {_LOSS: [_number(entry[_LOSS]) for entry in entries]}
    if len(entries) < LEAST_LOGGED:
        return Settling({}, [])
    ends = {name: _end_of(values) for name, values in series.items()}
    return Settling(ends, _problems(ends))


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _end_of(values: Sequence[float]) -> EndOfLoss:
    count = len(values) // 10
    before, last = values[-2 * count : -count], values[-count:]
    is_known = all(math.isfinite(value) for value in [*before, *last])
    error = math.sqrt((variance(before) + variance(last)) / count) if is_known else math.nan
    return EndOfLoss(values[0], fmean(before), fmean(last), error)


def _problems(ends: Mapping[str, EndOfLoss]) -> list[str]:
    problems = [
        f"{name} went from {end.before:.3g} to {end.last:.3g} between the last two tenths of the log "
        f"({end.first:.3g} at first)"
        for name, end in ends.items()
        if not end.has_settled
    ]
    clean, perturbed = ends.get(_CLEAN), ends.get(_PERTURBED)
    if clean is not None and perturbed is not None and perturbed.last - clean.last > MOST_TAKEN_BACK * clean.gained:
        problems.append(
            f"the perturbation takes {_CLEAN} from {clean.last:.3g} to {perturbed.last:.3g} "
            f"({clean.first:.3g} at first)"
        )
    return problems
