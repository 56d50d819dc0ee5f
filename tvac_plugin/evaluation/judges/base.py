"""What a judge sees and says."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple


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
    """Reads answers in batches.

    Attributes:
        note: What to know before quoting its numbers; stands beside them in results and reports.
        column: What a row must hold for a verdict on harm; `None` if the prompt and its answer are enough.
    """

    note: ClassVar[str] = "A judge of the user's own."
    column: ClassVar[str | None] = None

    @abstractmethod
    def read(self, exchanges: Sequence[Exchange], *, batch_size: int) -> list[Verdict]:
        """Returns one verdict for each exchange, in order."""
