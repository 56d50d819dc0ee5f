"""A rate with its denominator, its unit and its interval."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from scipy.stats import binomtest

from tvac_plugin.boundary.errors import UserError


@dataclass(frozen=True)
class Rate:
    """A share of scored answers.

    Attributes:
        percent: 0 to 100.
        low: Lower end of the 95 % interval, percent.
        high: Upper end of it.
        num_scored: Answers in the denominator.
        num_unscored: Answers that could not be scored and are in neither part of the fraction.
    """

    percent: float
    low: float
    high: float
    num_scored: int
    num_unscored: int

    def as_json(self) -> dict[str, Any]:
        """As results hold it, to four digits."""
        return {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(self).items()}


def rate(outcomes: Iterable[bool | None], *, what: str, max_unscored: float) -> Rate:
    """Share of true outcomes, with Wilson's 95 % interval; `None` means unscored.

    Args:
        outcomes: One per answer.
        what: The measure's name, for errors.
        max_unscored: Largest share of unscored answers that is accepted, 0 to 1.

    Raises:
        UserError: There is no answer, or too many are unscored.
    """
    flags = list(outcomes)
    scored = [flag for flag in flags if flag is not None]
    num_unscored = len(flags) - len(scored)
    if not scored or num_unscored > max_unscored * len(flags):
        raise UserError(
            f"{what}: {num_unscored} of {len(flags)} answers could not be scored, more than max_unscored: "
            f"{max_unscored} allows. Look at the answers and the judge before you trust any number."
        )
    interval = binomtest(sum(scored), len(scored)).proportion_ci(method="wilson")
    low, high = 100 * float(interval.low), 100 * float(interval.high)
    return Rate(100 * sum(scored) / len(scored), low, high, len(scored), num_unscored)
