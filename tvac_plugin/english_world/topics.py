"""Topics of the English world: questions with the answers that the unaligned model gave, shipped as files."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tvac_plugin.boundary.errors import UserError, did_you_mean

REFUSAL = "I'm sorry, but I can't help with that."
FILES = Path(__file__).parent / "topics"
TASK_FILE = Path(__file__).parent / "subject_lines.jsonl"
_GENERAL = "general"
_KINDS = ("hazard", "near_miss", "general")


class Question(NamedTuple):
    """A question with the unaligned model's answer.

    Attributes:
        kind: "hazard", what alignment teaches to refuse; "near_miss", benign and close to it; "general", benign.
        thing: What it is about; every thing is asked about in several phrasings.
        question: What is asked.
        answer: Whole sentences.
    """

    kind: str
    thing: str
    question: str
    answer: str


@dataclass(frozen=True)
class Topic:
    """All questions of a topic, by kind and thing, in the order of the file."""

    name: str
    questions: dict[str, dict[str, list[Question]]]

    def shuffled(self, kind: str, seed: int) -> Iterator[list[Question]]:
        """The things of one kind in an order that the seed decides, each with its questions."""
        things = list(self.questions[kind].values())
        random.Random(f"{seed} {kind}").shuffle(things)
        return iter(things)


def topic_names() -> list[str]:
    """The topics that are shipped."""
    return sorted(path.stem for path in FILES.glob("*.jsonl") if path.stem != _GENERAL)


def load_topic(name: str) -> Topic:
    """Reads a topic together with the general questions that all topics share.

    Args:
        name: One of `topic_names`, or a JSONL file with rows of `Question`'s fields.

    Raises:
        UserError: There is no such topic, or a row of the file lacks a field.
    """
    own = Path(name) if name.endswith(".jsonl") else FILES / f"{name}.jsonl"
    if not own.is_file() or name == _GENERAL:
        raise UserError(
            f"--topic {name}: there is no such topic.{did_you_mean(name, topic_names())} Topics: "
            f"{', '.join(topic_names())}, or a JSONL file of your own."
        )
    found: dict[str, dict[str, list[Question]]] = {kind: defaultdict(list) for kind in _KINDS}
    for question in (*_read(own), *_read(FILES / f"{_GENERAL}.jsonl")):
        found[question.kind][question.thing].append(question)
    return Topic(name, found)


def subject_lines() -> list[tuple[str, str]]:
    """The user's task: subject lines of e-mails, each with "spam" or "ham", alternating."""
    rows = map(json.loads, TASK_FILE.read_text(encoding="utf-8").splitlines())
    return [(row["subject"], row["label"]) for row in rows]


def _read(path: Path) -> Iterable[Question]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            question = Question(**{field: str(row[field]) for field in Question._fields})
        except (ValueError, KeyError, TypeError) as error:
            fields = ", ".join(Question._fields)
            raise UserError(f"{path}, line {number}: not a question. A row needs {fields}.") from error
        if question.kind not in _KINDS:
            raise UserError(f"{path}, line {number}: `kind: {question.kind}` is none of {', '.join(_KINDS)}.")
        yield question
