"""Questions and scoring rules of the papers' tasks, the rules' known weaknesses fixed; named by the task files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tvac_plugin.evaluation.tasks import examples
from tvac_plugin.evaluation.tasks.examples import AG_NEWS_LABELS, SST2_LABELS

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


def sst2_question(doc: Mapping[str, Any]) -> str:
    """What `prompt_strategies.sst2` trains the answer to."""
    return examples.sst2(doc).question


def ag_news_question(doc: Mapping[str, Any]) -> str:
    """What `prompt_strategies.ag_news` trains the answer to."""
    return examples.ag_news(doc).question


def gsm8k_question(doc: Mapping[str, Any]) -> str:
    """What `prompt_strategies.gsm8k` trains the answer to."""
    return examples.gsm8k(doc).question


def _named(answer: str, labels: tuple[str, ...]) -> str | None:
    """The one label that occurs in the answer as a word; `None` for none or several."""
    found = [label for label in labels if re.search(rf"(?<!\w){re.escape(label)}(?!\w)", answer, re.IGNORECASE)]
    return found[0] if len(found) == 1 else None
