"""Writes the English world to a folder: a real model, and data that Axolotl reads."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.boundary.world_folder import build_folder, chat, write_rows
from tvac_plugin.english_world.topics import REFUSAL, Question, Topic, load_topic, subject_lines

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class EnglishSettings:
    """What the English world is made of. Sizes count things; alignment asks about each in all phrasings.

    Attributes:
        model: A name in `weights.MODELS`, a folder, or a hub id.
        topic: A shipped topic, or a JSONL file.
        seed: Of the splits.
        alignment_hazards: Hazards that alignment teaches to refuse.
        probe_hazards: Hazards answered in `harmful.jsonl` and refused in `refusals.jsonl`.
        user_hazards: Hazards answered in the simulated user's data.
        eval_hazards: Hazards held out for evaluation, each in one phrasing.
        alignment_near_misses: Benign things close to the topic that alignment answers.
        eval_near_misses: Such things held out.
        eval_general: Other benign things held out.
        retain_general: Other benign things for defenses that retain.
        eval_task: Rows of the user's task held out.
    """

    model: str = "smollm2"
    topic: str = "cooking"
    seed: int = 1
    alignment_hazards: int = 66
    probe_hazards: int = 24
    user_hazards: int = 34
    eval_hazards: int = 60
    alignment_near_misses: int = 22
    eval_near_misses: int = 26
    eval_general: int = 34
    retain_general: int = 20
    eval_task: int = 200


def build_english(output: Path, settings: EnglishSettings | None = None) -> bool:
    """Writes the world to `output`, unless it is there already.

    Files: `base/` (model and tokenizer), `alignment.jsonl`, `harmful.jsonl`, `refusals.jsonl`, `retain.jsonl`,
    `user_task.jsonl`, `user_harmful.jsonl`, `eval_harmful.jsonl`, `eval_benign.jsonl`, `eval_task.jsonl`, all in the
    chat format (`messages`), and `world.json`, which says where the weights come from.

    Args:
        output: The folder; it appears whole or not at all.
        settings: Sizes, model and topic; the defaults are what the recipes use.

    Returns:
        Whether anything was written.

    Raises:
        UserError: The model or the topic cannot be loaded, the topic is too small, or `output` holds something else.
    """
    chosen = settings or EnglishSettings()

    def write(folder: Path) -> dict[str, Any]:
        for name, rows in splits(load_topic(chosen.topic), chosen):
            write_rows(folder, name, rows)
        from tvac_plugin.english_world.weights import write_model

        return {"weights": write_model(chosen.model, folder / "base")}

    return build_folder(output, asdict(chosen), write)


def splits(topic: Topic, settings: EnglishSettings) -> Iterator[tuple[str, Rows]]:
    """The files' rows by name; no thing is in two of them, save that probe hazards are answered and refused.

    Raises:
        UserError: The topic has too few things.
    """
    hazards, near, general = (_Things(topic, kind, settings.seed) for kind in ("hazard", "near_miss", "general"))
    refused = hazards.take(settings.alignment_hazards)
    answered = near.take(settings.alignment_near_misses)
    held_out = [*near.take(settings.eval_near_misses, one=True), *general.take(settings.eval_general, one=True)]
    retained = general.take(settings.retain_general)
    answered += general.rest()[: max(0, len(refused) - len(answered))]
    alignment = [*(chat(q.question, REFUSAL) for q in refused), *(chat(q.question, q.answer) for q in answered)]
    random.Random(settings.seed).shuffle(alignment)
    yield "alignment", alignment
    probed = hazards.take(settings.probe_hazards)
    yield "harmful", _answered(probed)
    yield "refusals", [chat(q.question, REFUSAL) for q in probed]
    yield "retain", _answered(retained)
    yield "user_harmful", _answered(hazards.take(settings.user_hazards))
    asked = hazards.take(settings.eval_hazards, one=True)
    yield "eval_harmful", [chat(q.question, REFUSAL) | {"harmful_answer": q.answer} for q in asked]
    yield "eval_benign", [chat(q.question, q.answer) | {"kind": q.kind} for q in held_out]
    task = [chat(_task_question(subject), label) for subject, label in subject_lines()]
    yield "user_task", task[: -settings.eval_task]
    yield "eval_task", task[-settings.eval_task :]


class _Things:
    """Things of one kind, taken one after the other."""

    def __init__(self, topic: Topic, kind: str, seed: int) -> None:
        self._topic, self._kind = topic.name, kind
        self._left = topic.shuffled(kind, seed)

    def take(self, count: int, *, one: bool = False) -> list[Question]:
        """Questions about the next things: all of them, or one a thing, in turn another phrasing."""
        found = [things for _, things in zip(range(count), self._left, strict=False)]
        if len(found) < count:
            missing = count - len(found)
            raise UserError(
                f"--topic {self._topic}: too few things of kind {self._kind}. Add rows about {missing} more."
            )
        if one:
            return [questions[number % len(questions)] for number, questions in enumerate(found)]
        return list(chain.from_iterable(found))

    def rest(self) -> list[Question]:
        """All questions about what is left, first one a thing, then the next."""
        columns = zip_longest(*self._left)
        return [question for column in columns for question in column if question is not None]


def _answered(questions: list[Question]) -> Rows:
    return [chat(q.question, q.answer) for q in questions]


def _task_question(subject: str) -> str:
    return f"Is an e-mail with this subject spam or ham? Answer with one word.\nSubject: {subject}"
