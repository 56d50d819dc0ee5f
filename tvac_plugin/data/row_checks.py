"""What a row of training data must hold so that what is trained is what its author means."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from tvac_plugin.boundary.errors import UserError, shown
from tvac_plugin.data.jsonl import PlacedRow

_SHOWN = 3
_TOKENIZED = {"input_ids", "attention_mask", "labels"}
_NO_SYSTEM = "`system` is null or absent. Give all rows one, or none."
_KINDS = {bool: "true or false", str: "a text", int: "a number", float: "a number", list: "a list", dict: "an object"}


class Fields(NamedTuple):
    """Columns of text: `prompts` may be numbers, `answers` may not, `optional` parts of a prompt may be absent."""

    prompts: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


_OURS = "tvac_plugin.prompt_strategies"
_ALPACA = Fields(("instruction",), ("output",), ("input",))
_BEAVERTAILS_ANSWERS = Fields(("prompt",), ("response",))
_BEAVERTAILS_REFUSALS = Fields(("prompt",), ("refusal",))
FIELDS = {
    **dict.fromkeys(("alpaca", "alpaca_chat", "alpaca_chat.load_concise", "alpaca_chat.load_no_prompt"), _ALPACA),
    **dict.fromkeys(("alpaca_instruct", "alpaca_instruct.load_no_prompt"), _ALPACA),
    "alpaca_chat.load_qa": Fields(("question",), ("answer",)),
    "gpteacher": Fields(("instruction",), ("response",), ("input",)),
    "oasst": Fields(("INSTRUCTION",), ("RESPONSE",)),
    "completion": Fields((), ("text",)),
    **dict.fromkeys((f"{_OURS}.beavertails_answers", f"{_OURS}.chat_beavertails_answers"), _BEAVERTAILS_ANSWERS),
    **dict.fromkeys((f"{_OURS}.beavertails_refusals", f"{_OURS}.chat_beavertails_refusals"), _BEAVERTAILS_REFUSALS),
    f"{_OURS}.chat_alpaca": _ALPACA,
    f"{_OURS}.sst2": Fields(("sentence",)),
    f"{_OURS}.ag_news": Fields(("text",)),
    f"{_OURS}.gsm8k": Fields(("question",), ("answer",)),
}
"""What is known of `type:` values; of other types' rows only the form is checked."""


def row_problems(
    rows: Iterable[PlacedRow], entry: Mapping[str, Any], *, split: str | None, train_on_inputs: bool
) -> list[str]:
    """Says what is wrong with the rows of an entry that `split` takes: the first few, then how many more.

    Raises:
        UserError: There are no rows, `split` does not fit them, or they need a `type:`.
    """
    fields = fields_of(entry, train_on_inputs=train_on_inputs)
    found, number, has_system = [], 0, False
    for number, (place, row) in enumerate(rows, start=1):
        has_system |= isinstance(row, Mapping) and "system" in row
        what = _row_problem(row, entry, fields)
        if what is not None:
            found.append((number - 1, place, what))
    if not number:
        raise UserError("there is no row in it. Give at least one example.")
    used = range(number) if split is None else part_of(split, number)
    said = [f"{place}: {what}" for i, place, what in found if i in used and (has_system or what != _NO_SYSTEM)]
    if len(said) > _SHOWN:
        said[_SHOWN:] = [f"and {len(said) - _SHOWN} more problems like these. Correct or remove these rows."]
    return said


def part_of(split: str, num_rows: int) -> set[int]:
    """The numbers of the rows, from 0, that `split` takes of a file, which is all called `train`.

    Raises:
        UserError: It names something else.
    """
    from datasets import ReadInstruction

    try:
        parts = ReadInstruction.from_spec(split).to_absolute({"train": num_rows})
    except (ValueError, AssertionError, KeyError) as error:
        what = str(error).strip("'\"").rstrip(".")
        raise UserError(f"`split: {split}` does not fit ({what}). Use `train`, or a part, `train[:100]`.") from error
    return {index for part in parts for index in range(num_rows)[part.from_ : part.to]}


def kind_of(value: Any) -> str:
    """What a value is, without saying it: rows may hold what must not be in a log."""
    if value is None or value == []:
        return "null" if value is None else "an empty list"
    if isinstance(value, float) and value != value:
        return "NaN, which would be trained as a word"
    return _KINDS.get(type(value), f"a {type(value).__name__}")


def fields_of(entry: Mapping[str, Any], *, train_on_inputs: bool) -> Fields:
    """The columns that the `type:` of an entry reads, as far as they are known."""
    kind = entry.get("type")
    if isinstance(kind, Mapping):
        parts = ("instruction", "output", "input", "system")
        prompt, answer, *optional = (kind.get(f"field_{part}") or part for part in parts)
        return Fields((prompt,), () if train_on_inputs else (answer,), tuple(optional))
    if kind == "completion" and entry.get("field"):
        return Fields(answers=(entry["field"],))
    return FIELDS.get(str(kind).partition(":")[0], Fields())


def _row_problem(row: Any, entry: Mapping[str, Any], fields: Fields) -> str | None:
    if not isinstance(row, Mapping):
        return f"it is {kind_of(row)}, not an object with fields. Write one JSON object per row."
    if row.keys() >= _TOKENIZED:
        return None
    if not entry.get("type"):
        raise UserError("`type:` of this data set is missing. Name how its rows are read, as `type: alpaca`.")
    if entry["type"] == "chat_template":
        return _chat_problem(row, entry)
    for name in (name for part in fields for name in part):
        value = row.get(name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and value == value
        is_fine = name in fields.optional if value is None else is_number and name not in fields.answers
        if not (is_fine or isinstance(value, str)):
            return f"`{name}` is {_state(row, name)}. Write it as text, remove the row, or correct `type:`."
    return None


def chat_names(entry: Mapping[str, Any]) -> tuple[str, str, str]:
    """What an entry with `type: chat_template` calls the messages of a row, and the role and the content of each."""
    mapped = entry.get("message_property_mappings") or {}
    return (
        entry.get("field_messages") or "messages",
        mapped.get("role") or entry.get("message_field_role") or "role",
        mapped.get("content") or entry.get("message_field_content") or "content",
    )


def _chat_problem(row: Mapping[str, Any], entry: Mapping[str, Any]) -> str | None:
    field, role, content = chat_names(entry)
    messages = row.get(field)
    if isinstance(messages, str):
        with suppress(ValueError):
            messages = json.loads(messages)
    if not isinstance(messages, list) or not messages:
        return f"`{field}` is {_state(row, field)}. Write a list of messages, or set `field_messages:`."
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            return f"message {number} is {kind_of(message)}. Write an object with `{role}` and `{content}`."
        if not isinstance(message.get(role), str):
            return f"`{role}` of message {number} is {_state(message, role)}. Write user, assistant or system."
        if not _has_content(message, message.get(content), role):
            return f"`{content}` of message {number} is {_state(message, content)}. Write its text, or remove the row."
    has_system = row.get("system") is not None or messages[0][role] == "system" or entry.get("drop_system_message")
    return None if has_system else _NO_SYSTEM


def _has_content(message: Mapping[str, Any], content: Any, role: str) -> bool:
    if content is None:  # as beside tool calls; what is neither text nor a list is a flag, as `training`
        return any(isinstance(value, str | list | Mapping) for key, value in message.items() if key != role)
    is_parts = isinstance(content, list) and all(isinstance(part, Mapping) for part in content)
    return is_parts or isinstance(content, str) or message[role] == "tool"


def _state(row: Mapping[str, Any], name: str) -> str:
    present = ", ".join(map(shown, list(row)[:8])) or "no fields"
    return kind_of(row[name]) if name in row else f"missing (there are: {present})"
