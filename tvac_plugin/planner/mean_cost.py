"""What a defense costs over all the kinds of micro-batches that it says there are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tvac_plugin.configs.base import DefenseConfig
from tvac_plugin.defenses import StepKind, step_kinds
from tvac_plugin.planner.ledger import Cost
from tvac_plugin.planner.step import StepCounter

Probes = Sequence[Sequence[float]]
"""Probabilities of all layers, for each probe of an earlier run."""


class MeanCost(NamedTuple):
    """A micro-batch of a defense.

    Attributes:
        heaviest: The one that holds most bytes.
        saved: Bytes that autograd keeps in the costliest of the kinds that lie on a line, or in any.
        mean_saved: The same over all kinds.
        mean_flops: Work over all kinds.
    """

    heaviest: Cost
    saved: int
    mean_saved: float
    mean_flops: float


def mean_cost(counter: StepCounter, config: DefenseConfig, *, accumulation: int, probes: Probes = ()) -> MeanCost:
    """Counts every kind of micro-batch, and those on a line by some of them where the line is straight."""
    kinds = step_kinds(config, counter.num_layers, accumulation=accumulation, probes=probes)
    line = [kind for kind in kinds if kind.place is not None]
    costs = {
        id(kind): _count(counter, kind) for kind in [*_ends_and_middle(line), *(k for k in kinds if k.place is None)]
    }
    if not all(_is_straight(line, costs, field) for field in ("saved", "flops")):
        costs |= {id(kind): _count(counter, kind) for kind in line if id(kind) not in costs}
    first = line or kinds
    return MeanCost(
        heaviest=max(costs.values(), key=lambda cost: cost.peak),
        saved=costs[id(first[0])].saved,
        mean_saved=_mean(kinds, line, costs, "saved"),
        mean_flops=_mean(kinds, line, costs, "flops"),
    )


def heaviest_cost(counter: StepCounter, config: DefenseConfig, *, accumulation: int, probes: Probes = ()) -> Cost:
    """The most that a micro-batch may hold, without counting those that hold less."""
    kinds = step_kinds(config, counter.num_layers, accumulation=accumulation, probes=probes)
    places = [kind.place for kind in kinds if kind.place is not None]
    costliest = [kind for kind in kinds if kind.place is None or kind.place == min(places)]
    return max((_count(counter, kind) for kind in costliest), key=lambda cost: cost.peak)


def _count(counter: StepCounter, kind: StepKind) -> Cost:
    return counter.count(kind.config, position=kind.position, state=kind.state)


def _ends_and_middle(line: Sequence[StepKind]) -> list[StepKind]:
    count = len(line)
    return [line[place] for place in sorted({0, min(1, count - 1), count // 2, count - 1})] if line else []


def _points(line: Iterable[StepKind], costs: dict[int, Cost], field: str) -> dict[int, int]:
    """What was counted on the line beyond its first place, by place."""
    return {kind.place: getattr(costs[id(kind)], field) for kind in line if id(kind) in costs and kind.place}


def _is_straight(line: Sequence[StepKind], costs: dict[int, Cost], field: str) -> bool:
    points = _points(line, costs, field)
    if len(points) < 2:
        return True
    (x0, y0), (x1, y1) = min(points.items()), max(points.items())
    return all((y - y0) * (x1 - x0) == (y1 - y0) * (x - x0) for x, y in points.items())


def _mean(kinds: Sequence[StepKind], line: Sequence[StepKind], costs: dict[int, Cost], field: str) -> float:
    points = _points(line, costs, field)
    (x0, y0), (x1, y1) = (min(points.items()), max(points.items())) if points else ((0, 0), (1, 0))
    slope = (y1 - y0) / (x1 - x0) if x1 > x0 else 0.0

    def of(kind: StepKind) -> float:
        counted = costs.get(id(kind))
        return y0 + slope * ((kind.place or 0) - x0) if counted is None else getattr(counted, field)

    return sum(kind.share * of(kind) for kind in kinds)
