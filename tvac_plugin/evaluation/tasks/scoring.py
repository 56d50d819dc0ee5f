"""Scoring rules of the papers' tasks, with their known weaknesses mended; named by the task files beside this one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

SST2_LABELS = ("negative", "positive")
AG_NEWS_LABELS = ("World", "Sports", "Business", "Sci/Tech")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def sst2(doc: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    """Right if the answer names the right class and not the other one."""
    return {"acc": float(_named(results[0], SST2_LABELS) == SST2_LABELS[doc["label"]])}


def ag_news(doc: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    """Right if the answer names the right class and no other one."""
    return {"acc": float(_named(results[0], AG_NEWS_LABELS) == AG_NEWS_LABELS[doc["label"]])}


def gsm8k(doc: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    """Right if the number after "The final answer is:", or else the last number, is the reference's."""
    answer = results[0].rpartition("The final answer is:")[2]
    marked = "The final answer is:" in results[0]
    numbers = _NUMBER.findall(answer)
    reference = float(doc["answer"].rpartition("####")[2].strip().replace(",", ""))
    chosen = (numbers[:1] if marked else numbers[-1:]) or [None]
    return {"acc": float(chosen[0] is not None and float(chosen[0].replace(",", "")) == reference)}


def _named(answer: str, labels: tuple[str, ...]) -> str | None:
    """The one label that occurs in the answer as a word; `None` for none or several."""
    found = [label for label in labels if re.search(rf"(?<!\w){re.escape(label)}(?!\w)", answer, re.IGNORECASE)]
    return found[0] if len(found) == 1 else None
