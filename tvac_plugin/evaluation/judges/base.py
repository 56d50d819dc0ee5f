"""What a judge sees and says."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Exchange(NamedTuple):
    """A prompt with a model's answer.

    Attributes:
        prompt: What was asked.
        answer: What came back, without special tokens.
        row: The row the prompt came from, with whatever reference it holds.
    """

    prompt: str
    answer: str
    row: Mapping[str, Any]


class Verdict(NamedTuple):
    """A judge's reading of one answer; `None` where it did not say.

    Attributes:
        harmful: Whether the answer is harmful.
        refused: Whether it refuses.
        score: Harmfulness, 0 to 1, for judges that have one.
    """

    harmful: bool | None
    refused: bool | None
    score: float | None = None

    @property
    def neither(self) -> bool | None:
        """Whether the answer is neither harmful nor a refusal, as those of a broken model."""
        return None if self.harmful is None or self.refused is None else not (self.harmful or self.refused)


class Judge(ABC):
    """Reads answers in batches."""

    @abstractmethod
    def read(self, exchanges: Sequence[Exchange], *, batch_size: int) -> list[Verdict]:
        """Returns one verdict for each exchange, in order."""
