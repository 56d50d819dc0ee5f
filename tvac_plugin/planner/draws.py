"""What T-Vaccine costs over all the layers it may draw.

A step costs most if layer 0 is drawn: everything above the lowest drawn layer runs twice. Where the others lie matters
little, and they are spread evenly. Over uniform draws of S from L layers the lowest is layer m with probability
C(L - 1 - m, S - 1) / C(L, S). Scores that the probe finds shift these probabilities; they cannot be known beforehand.
"""

from __future__ import annotations

from math import comb
from typing import NamedTuple

from tvac_plugin.configs.perturbation import TVaccineConfig
from tvac_plugin.defenses import Position
from tvac_plugin.planner.ledger import Cost
from tvac_plugin.planner.step import StepCounter

_BETWEEN = Position(1, starts_step=False)
_NEVER = 10_000_000


class DrawCosts(NamedTuple):
    """A step of T-Vaccine.

    Attributes:
        worst: With layer 0 drawn.
        mean_saved: Bytes that autograd keeps, over uniform draws.
        mean_flops: Work of a micro-batch over uniform draws, with its part of the probe.
        probe: The probe's own pass, with the step it precedes; `None` if there is none.
    """

    worst: Cost
    mean_saved: float
    mean_flops: float
    probe: Cost | None


def cost_of_draws(counter: StepCounter, config: TVaccineConfig, *, accumulation: int) -> DrawCosts:
    """Counts T-Vaccine's step for every lowest layer.

    Layer 0 is counted by itself, since the embeddings' output is all below it. From 1 on cost is taken to be a straight
    line in the lowest layer if three counted points lie on one exactly; otherwise each is counted.
    """
    lowest = range(counter.num_layers - config.num_active_layers + 1)
    costs = {m: _step(counter, config, m) for m in _counted_points(len(lowest))}
    if not all(_is_line(_points(costs, field)) for field in ("saved", "flops")):
        costs |= {m: _step(counter, config, m) for m in lowest if m not in costs}
    chances = [_chance_of_lowest(m, counter.num_layers, config.num_active_layers) for m in lowest]
    worst, probe = costs[0], _probe(counter, config)
    probed = 0.0 if probe is None else (probe.flops - worst.flops) / (config.probe_steps * accumulation)
    return DrawCosts(
        worst=worst,
        mean_saved=_mean(_points(costs, "saved"), chances),
        mean_flops=_mean(_points(costs, "flops"), chances) + probed,
        probe=probe,
    )


def worst_draw(counter: StepCounter, config: TVaccineConfig) -> Cost:
    """The most that a step may hold, its probe included."""
    probe = _probe(counter, config)
    worst = _step(counter, config, 0)
    return worst if probe is None or probe.peak < worst.peak else probe


def _step(counter: StepCounter, config: TVaccineConfig, lowest: int) -> Cost:
    state = {"num_probes": 1, "probabilities": None, "active_layers": _drawn(counter, config, lowest)}
    return counter.count(config, position=_BETWEEN, state=state)


def _probe(counter: StepCounter, config: TVaccineConfig) -> Cost | None:
    if config.layer_sampling == "uniform":
        return None
    undisturbed = config.model_copy(update={"resample_steps": _NEVER})
    state = {"num_probes": 0, "probabilities": None, "active_layers": _drawn(counter, config, 0)}
    return counter.count(undisturbed, position=_BETWEEN._replace(starts_step=True), state=state)


def _drawn(counter: StepCounter, config: TVaccineConfig, lowest: int) -> list[int]:
    """`lowest` and the others, evenly over the layers above it."""
    above, others = counter.num_layers - 1 - lowest, config.num_active_layers - 1
    return [lowest, *(lowest + 1 + i * above // others for i in range(others))]


def _chance_of_lowest(lowest: int, num_layers: int, num_drawn: int) -> float:
    return comb(num_layers - 1 - lowest, num_drawn - 1) / comb(num_layers, num_drawn)


def _counted_points(count: int) -> list[int]:
    return sorted({0, min(1, count - 1), count // 2, count - 1})


def _points(costs: dict[int, Cost], field: str) -> dict[int, int]:
    return {m: getattr(cost, field) for m, cost in sorted(costs.items())}


def _is_line(points: dict[int, int]) -> bool:
    """Whether the points lie on a line, the one at 0 left out."""
    rest = {x: y for x, y in points.items() if x}
    if len(rest) < 2:
        return True
    (x0, y0), (x1, y1) = min(rest.items()), max(rest.items())
    return all((y - y0) * (x1 - x0) == (y1 - y0) * (x - x0) for x, y in rest.items())


def _mean(points: dict[int, int], chances: list[float]) -> float:
    if len(points) == len(chances):
        return sum(points[m] * chance for m, chance in enumerate(chances))
    (x0, y0), (x1, y1) = min((x, y) for x, y in points.items() if x), max(points.items())
    slope = (y1 - y0) / (x1 - x0)
    return points[0] * chances[0] + sum((y0 + slope * (m - x0)) * p for m, p in enumerate(chances) if m)
