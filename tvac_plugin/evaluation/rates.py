"""A rate with its denominator, its unit and its interval."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

_Z95 = 1.959963984540054


class TooManyUnscoredError(ValueError):
    """So many answers could not be scored that a rate would say nothing."""


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

    def __str__(self) -> str:
        """Reads "14.9 (12.8 to 17.2, n = 1000, 3 unscored)"."""
        return (
            f"{self.percent:.1f} ({self.low:.1f} to {self.high:.1f}, n = {self.num_scored}, "
            f"{self.num_unscored} unscored)"
        )


def rate(outcomes: Iterable[bool | None], *, what: str, max_unscored: float) -> Rate:
    """Share of true outcomes, with Wilson's 95 % interval; `None` means unscored.

    Args:
        outcomes: One per answer.
        what: The measure's name, for errors.
        max_unscored: Largest share of unscored answers that is accepted, 0 to 1.

    Raises:
        TooManyUnscoredError: There is no answer, or too many are unscored.
    """
    flags = list(outcomes)
    scored = [flag for flag in flags if flag is not None]
    num_unscored = len(flags) - len(scored)
    if not scored or num_unscored > max_unscored * len(flags):
        raise TooManyUnscoredError(
            f"{what}: {num_unscored} of {len(flags)} answers could not be scored, more than max_unscored: "
            f"{max_unscored} allows. Look at the answers and the judge before you trust any number."
        )
    low, high = _wilson(sum(scored), len(scored))
    return Rate(100 * sum(scored) / len(scored), low, high, len(scored), num_unscored)


def _wilson(successes: int, count: int) -> tuple[float, float]:
    share, z2 = successes / count, _Z95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)
