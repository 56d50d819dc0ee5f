"""How layers are drawn from scores, and how often each is the lowest one drawn, which decides what a step costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, comb
from typing import Any

import torch
from torch import Tensor

from tvac_plugin.configs.perturbation import LayerSampling, OASISConfig, TVaccineConfig
from tvac_plugin.defenses.base import Position, StepKind

_NUM_SIMULATED = 20_000
"""Draws from which shares are estimated; one of probability 0.1 is off by 0.002, by its standard error."""


def layer_probabilities(scores: Tensor) -> Tensor:
    """Scores s_l, [layers], to probabilities p_l = s_l / sum over j of s_j; uniform where they say nothing."""
    total = scores.sum()
    if not torch.isfinite(total) or total <= 0:
        return uniform(len(scores))
    return (scores / total).clamp(min=1e-12)


def uniform(count: int) -> Tensor:
    """Equal probabilities, [layers]."""
    return torch.full((count,), 1 / count, dtype=torch.float64)


def entropy(probabilities: Tensor) -> float:
    """Entropy in nats: log(layers) when all layers matter alike, 0 when one is all that matters."""
    return float(-(probabilities * probabilities.log()).sum())


def draw_layers(probabilities: Tensor, count: int, sampling: LayerSampling, *, seed: int) -> Tensor:
    """`count` different layers, in no order, as `sampling` says.

    Args:
        probabilities: [layers], or [draws, layers] for many draws at a time.
        count: How many.
        sampling: The highest with "top_k", else without replacement.
        seed: Of the draw.
    """
    if sampling == "top_k":
        return probabilities.topk(count).indices
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(probabilities, count, replacement=False, generator=generator)


def lowest_layer_shares(
    num_layers: int, count: int, sampling: LayerSampling, *, probes: Sequence[Sequence[float]] = ()
) -> dict[int, float]:
    """The share of draws in which a layer is the lowest, by layer, for all layers that can be.

    Over uniform draws of S from L layers that is layer m with probability C(L - 1 - m, S - 1) / C(L, S). Where probes
    are known, it is estimated from draws with their probabilities, each probe counting alike.

    Args:
        num_layers: L.
        count: S.
        sampling: How they are drawn.
        probes: Probabilities or scores of all layers, for each probe; none for uniform draws.
    """
    possible = range(num_layers - count + 1)
    if not probes:
        return {lowest: comb(num_layers - 1 - lowest, count - 1) / comb(num_layers, count) for lowest in possible}
    rows = 1 if sampling == "top_k" else ceil(_NUM_SIMULATED / len(probes))
    lowest = torch.cat(
        [
            draw_layers(_row(probe).expand(rows, -1), count, sampling, seed=number).min(dim=-1).values
            for number, probe in enumerate(probes)
        ]
    )
    shares = (torch.bincount(lowest, minlength=len(possible)) / len(lowest)).tolist()
    return {layer: share for layer, share in enumerate(shares) if share or sampling != "top_k"}


def kinds_by_lowest_layer(
    config: TVaccineConfig | OASISConfig,
    num_layers: int,
    sampling: LayerSampling,
    *,
    probes: Sequence[Sequence[float]],
    state_of: Callable[[Sequence[int]], dict[str, Any]],
) -> list[StepKind]:
    """A kind of step for each layer that can be the lowest one drawn, with the other layers spread evenly above it.

    Args:
        config: The settings to take them with.
        num_layers: Decoder layers of the model.
        sampling: How layers are drawn.
        probes: Probabilities or scores of all layers, for each probe; none for uniform draws.
        state_of: The defense's state in which these layers are drawn.
    """
    num_drawn, kinds = config.num_active_layers, []
    for lowest, share in lowest_layer_shares(num_layers, num_drawn, sampling, probes=probes).items():
        above = [lowest + 1 + i * (num_layers - 1 - lowest) // (num_drawn - 1) for i in range(num_drawn - 1)]
        state = state_of([lowest, *above])
        kinds.append(StepKind(share, config, Position(1, starts_step=False), state, place=lowest))
    return kinds


def with_probe(kinds: Sequence[StepKind], probe: StepKind) -> list[StepKind]:
    """`kinds`, and the step of a probe, which is taken with the costliest draw and counts among its steps."""
    costliest = kinds[0]
    return [costliest._replace(share=costliest.share - probe.share), *kinds[1:], probe]


def _row(probe: Sequence[float]) -> Tensor:
    return layer_probabilities(torch.tensor(probe, dtype=torch.float64)).unsqueeze(0)
