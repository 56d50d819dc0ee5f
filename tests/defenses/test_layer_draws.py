"""Draws of layers, and how often each layer is the lowest one drawn."""

from __future__ import annotations

from itertools import combinations, permutations

import pytest
import torch

from tvac_plugin.configs.perturbation import TVaccineConfig
from tvac_plugin.defenses import step_kinds
from tvac_plugin.defenses.layer_draws import draw_layers, layer_probabilities, lowest_layer_shares

SKEWED = [0.55, 0.05, 0.3, 0.1]


def exact_shares(probabilities, count):
    """The lowest of `count` layers drawn one after the other, summed over all orders in which they may come."""
    shares = [0.0] * len(probabilities)
    for order in permutations(range(len(probabilities)), count):
        chance, left = 1.0, 1.0
        for layer in order:
            chance, left = chance * probabilities[layer] / left, left - probabilities[layer]
        shares[min(order)] += chance
    return shares


@pytest.mark.parametrize("count", [1, 2, 3])
def test_shares_of_skewed_draws_are_those_of_all_orders(count):
    found = lowest_layer_shares(4, count, "gradient_norm", probes=[SKEWED])
    assert list(found) == list(range(5 - count))
    for layer, share in found.items():
        assert share == pytest.approx(exact_shares(SKEWED, count)[layer], abs=0.015)


def test_several_probes_count_alike():
    found = lowest_layer_shares(4, 1, "gradient_norm", probes=[[1, 0, 0, 0], [0, 0, 0, 1]])
    assert (found[0], found[3]) == (pytest.approx(0.5, abs=1e-3), pytest.approx(0.5, abs=1e-3))


def test_without_probes_all_sets_are_equally_likely():
    sets = list(combinations(range(5), 2))
    for layer, share in lowest_layer_shares(5, 2, "uniform").items():
        assert share == pytest.approx(sum(min(drawn) == layer for drawn in sets) / len(sets))


def test_top_k_has_one_lowest_layer_for_each_probe():
    assert lowest_layer_shares(4, 2, "top_k", probes=[SKEWED, [0.1, 0.2, 0.3, 0.4]]) == {0: 0.5, 2: 0.5}


def test_the_same_probes_give_the_same_shares():
    assert len({str(lowest_layer_shares(4, 2, "gradient_norm", probes=[SKEWED])) for _ in range(3)}) == 1


def test_many_draws_at_a_time_are_each_without_repetition():
    drawn = draw_layers(layer_probabilities(torch.tensor(SKEWED)).expand(500, -1), 3, "gradient_norm", seed=1)
    assert all(len(set(row)) == 3 for row in drawn.tolist())


def test_kinds_of_steps_follow_the_probes():
    config = TVaccineConfig(num_active_layers=2, probe_steps=5)
    kinds = step_kinds(config, 4, accumulation=2, probes=[SKEWED])
    assert sum(kind.share for kind in kinds) == pytest.approx(1.0)
    shares = lowest_layer_shares(4, 2, "gradient_norm", probes=[SKEWED])
    assert [kind.place for kind in kinds] == [*shares, None]
    assert kinds[1].share == shares[1]
    assert kinds[0].share == pytest.approx(shares[0] - kinds[-1].share)
