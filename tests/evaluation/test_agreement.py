"""How far two judges agree, against a library's kappa."""

from __future__ import annotations

import random

import pytest
from sklearn.metrics import cohen_kappa_score

from tvac_plugin.evaluation.agreement import Agreement


@pytest.mark.parametrize("seed", range(5))
def test_kappa_is_cohen_s(seed):
    draw = random.Random(seed)
    first = [draw.random() < 0.4 for _ in range(80)]
    second = [flag if draw.random() < 0.8 else not flag for flag in first]
    found = Agreement.of(first, second)
    assert found.kappa == pytest.approx(cohen_kappa_score(first, second))
    assert found.percent == pytest.approx(100 * sum(a == b for a, b in zip(first, second, strict=True)) / 80)
    assert found.flagged == pytest.approx(100 * sum(second) / 80)


def test_answers_on_which_one_said_nothing_are_left_out():
    found = Agreement.of([True, None, False, True], [True, True, None, False])
    assert (found.both, found.first_only, found.second_only, found.neither) == (1, 1, 0, 0)
    assert (found.num_read, found.percent) == (2, 50.0)


def test_agreement_that_chance_alone_would_give_has_no_kappa():
    assert Agreement.of([False] * 5, [False] * 5).as_json() == {
        "both": 0, "first_only": 0, "second_only": 0, "neither": 5, "percent": 0.0, "agreement": 100.0, "kappa": None,
    }  # fmt: skip
    assert Agreement.of([None], [True]).as_json()["agreement"] is None


def test_seeds_are_added_up():
    found = [Agreement.of([True, False], [True, True]), Agreement.of([True, False, False], [False, False, False])]
    assert Agreement.over_seeds([each.as_json() for each in found]) == Agreement(1, 1, 1, 2)
