"""When an answer is that of the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

Match = Literal["exact", "in_order"]


def exact(reference: str, answer: str) -> bool:
    """Whether the answer is the reference, to the letter."""
    return answer == reference


def in_order(reference: str, answer: str) -> bool:
    """Whether all words of the reference stand in the answer, in their order, whatever stands between them."""
    words = iter(answer.split())
    return all(word in words for word in reference.split())


MATCHES: dict[Match, Callable[[str, str], bool]] = {"exact": exact, "in_order": in_order}
"""How an answer is compared, by the name that a recipe gives."""
