"""Rates carry their denominator, their interval and what could not be scored."""

from __future__ import annotations

import pytest

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.evaluation.rates import rate


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3 (Wilson's score)
    [(81, 263, 25.53, 36.62), (15, 148, 6.24, 16.05), (0, 20, 0.0, 16.11), (1, 29, 0.61, 17.18)],
)
def test_the_interval_is_wilson_s(successes, count, low, high):
    found = rate([True] * successes + [False] * (count - successes), what="x", max_unscored=0)
    assert found.percent == pytest.approx(100 * successes / count)
    assert (found.low, found.high) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))


def test_unscored_answers_are_counted_and_leave_the_denominator():
    found = rate([True, False, None, True], what="x", max_unscored=0.25)
    assert (found.num_scored, found.num_unscored) == (3, 1)
    assert found.percent == pytest.approx(200 / 3)
    assert found.as_json() == {"percent": 66.6667, "low": 20.766, "high": 93.8508, "num_scored": 3, "num_unscored": 1}


@pytest.mark.parametrize("outcomes", [[], [None], [True, None, None]])
def test_too_many_unscored_is_a_failure_not_a_low_score(outcomes):
    with pytest.raises(UserError, match="harmful score: .* could not be scored.*before you trust any number"):
        rate(outcomes, what="harmful score", max_unscored=0.5)
