"""How far two judges of the same answers agree."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Agreement:
    """What two judges flagged, of the answers on which both of them said something.

    Attributes:
        both: Answers that both flagged.
        first_only: Those that only the first one did.
        second_only: Those that only the second one did.
        neither: Those that neither did.
    """

    both: int
    first_only: int
    second_only: int
    neither: int

    @classmethod
    def of(cls, first: Sequence[bool | None], second: Sequence[bool | None]) -> Agreement:
        """Counts; an answer on which a judge did not say anything is left out."""
        pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
        return cls(*(pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))))

    @classmethod
    def over_seeds(cls, found: Iterable[dict[str, Any]]) -> Agreement:
        """Adds the counts of several, each as `as_json` writes it."""
        keys = cls.__dataclass_fields__
        return cls(*(sum(counts) for counts in zip(*([each[key] for key in keys] for each in found), strict=True)))

    @property
    def num_read(self) -> int:
        """Answers on which both said something."""
        return self.both + self.first_only + self.second_only + self.neither

    @property
    def percent(self) -> float | None:
        """Share of these on which they agree; `None` if there are none."""
        return 100 * (self.both + self.neither) / self.num_read if self.num_read else None

    @property
    def flagged(self) -> float | None:
        """Share of these that the second judge flagged, percent; `None` if there are none."""
        return 100 * (self.both + self.second_only) / self.num_read if self.num_read else None

    @property
    def kappa(self) -> float | None:
        """Agreement beyond chance (Cohen 1960): 1 is perfect, 0 is chance; `None` where all answers got one flag."""
        total, first, second = self.num_read, self.both + self.first_only, self.both + self.second_only
        by_chance = first * second + (total - first) * (total - second)
        if by_chance == total**2:
            return None
        return (total * (self.both + self.neither) - by_chance) / (total**2 - by_chance)

    def as_json(self) -> dict[str, Any]:
        """The counts, and what follows from them, to four digits."""
        derived = {"percent": self.flagged, "agreement": self.percent, "kappa": self.kappa}
        return asdict(self) | {key: value if value is None else round(value, 4) for key, value in derived.items()}
