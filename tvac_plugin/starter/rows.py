"""Rows of prompts with answers, read from the shapes in which people keep them, and written in a recipe's own."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.data.jsonl import json_rows
from tvac_plugin.data.row_checks import FIELDS

RowFormat = Literal["alpaca", "chat_template"]
_ALPACA = FIELDS["alpaca"]
_COLUMNS = (("instruction", "output"), ("prompt", "response"), ("question", "answer"), ("prompt", "completion"))
_MESSAGES = (("messages", "role", "content"), ("conversations", "from", "value"))
_ASKS, _ANSWERS = ("user", "human"), ("assistant", "gpt", "model")
_SHAPES = '{"messages": [...]}, {"instruction": ..., "output": ...} or {"prompt": ..., "response": ...}'


class Row(NamedTuple):
    """One question with its answer; `context` is Alpaca's `input`."""

    prompt: str
    answer: str
    context: str = ""

    @property
    def question(self) -> str:
        """Prompt and context as one text."""
        return f"{self.prompt}\n{self.context}" if self.context else self.prompt

    def as_json(self, form: RowFormat) -> dict[str, Any]:
        """A row that a recipe with data of this format trains on."""
        if form == "alpaca":
            return {"instruction": self.prompt, "input": self.context, "output": self.answer}
        return {"messages": self.messages()}

    def messages(self) -> list[dict[str, str]]:
        """The exchange as evaluations read it."""
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]


def row_format(entry: Mapping[str, Any], *, where: str) -> RowFormat:
    """How the rows of an entry of `datasets:` are read.

    Raises:
        UserError: In a way for which rows of other files cannot be written.
    """
    kind = entry.get("type")
    if isinstance(kind, str) and kind.partition(".")[0] == "chat_template":
        return "chat_template"
    if isinstance(kind, str) and FIELDS.get(kind.partition(":")[0]) == _ALPACA:
        return "alpaca"
    raise UserError(f"{where}: `type: {kind}` is neither alpaca's nor chat_template. Write the recipes by hand.")


def read_rows(path: Path, *, option: str) -> list[Row]:
    """The rows of a file of the user's, each prompt once, in an order that does not depend on the file's.

    Raises:
        UserError: It cannot be read, or a row is of none of the known shapes.
    """
    try:
        values = list(json_rows(path))
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be read ({error.strerror}). Give a JSON Lines file.") from error
    except UserError as error:
        raise UserError(f"{option} {path}: {error}") from error
    rows = []
    for place, value in values:
        if isinstance(value, Mapping) and value.get("is_safe") is True:
            continue
        row = parsed(value)
        if row is None:
            raise UserError(f"{option} {path}, {place}: no question with an answer. Write {_SHAPES}.")
        rows.append(row)
    return shuffled(unique(rows))


def parsed(value: Any, entry: Mapping[str, Any] | None = None) -> Row | None:
    """A row as a question with its first answer; `None` where it has none. `entry` may name its fields."""
    if not isinstance(value, Mapping):
        return None
    mapped = (entry or {}).get("message_property_mappings") or {}
    own = ((entry or {}).get("field_messages"), mapped.get("role", "role"), mapped.get("content", "content"))
    for field, role, content in (own, *_MESSAGES):
        if field is not None and isinstance(value.get(field), list):
            return _exchange(value[field], role, content)
    for prompt, answer in _COLUMNS:
        if isinstance(value.get(prompt), str) and isinstance(value.get(answer), str):
            return Row(value[prompt], value[answer], str(value.get("input") or "") if prompt == "instruction" else "")
    return None


def _exchange(messages: Sequence[Any], role: str, content: str) -> Row | None:
    said: dict[bool, str] = {}
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get(content), str):
            return None
        if message.get(role) in (*_ASKS, *_ANSWERS):
            said.setdefault(message[role] in _ASKS, message[content])
    return Row(said[True], said[False]) if len(said) == 2 else None


def unique(rows: Iterable[Row], *, without: Iterable[Row] = ()) -> list[Row]:
    """The first row of each question that is not among those of `without`."""
    taken = {row.question for row in without}
    return list({row.question: row for row in reversed(list(rows)) if row.question not in taken}.values())[::-1]


def shuffled(rows: Iterable[Row]) -> list[Row]:
    """In an order that does not depend on how they were sorted."""
    ordered = sorted(rows)
    random.Random(42).shuffle(ordered)
    return ordered


def training_text(rows: Iterable[Row], form: RowFormat) -> str:
    """JSON Lines to train on."""
    return _lines(row.as_json(form) for row in rows)


def evaluation_text(rows: Iterable[Row], form: RowFormat, *, harmful: bool = False) -> str:
    """JSON Lines to ask; they can also be read as training rows, to compare their prompts."""
    extra = {"harmful_answer"} if harmful else set()
    return _lines({**row.as_json(form), "messages": row.messages(), **dict.fromkeys(extra, row.answer)} for row in rows)


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
