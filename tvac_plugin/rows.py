"""What a row of training data must hold so that what is trained is what its author means."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from tvac_plugin.json_files import JsonFileError, Row
from tvac_plugin.messages import shown

_SHOWN = 3
_TOKENIZED = {"input_ids", "attention_mask", "labels"}
_TOOL_ROLE = "tool"
_AS_TEXT = "Write it as text, in JSON with quotes."


class Fields(NamedTuple):
    """The columns that a prompt strategy reads as text.

    Attributes:
        prompts: Needed; a number is put into the prompt as it is.
        answers: Needed; they are tokenized alone, where nothing but text will do.
        optional: Parts of the prompt that may be absent or null.
    """

    prompts: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


class Problem(NamedTuple):
    """What is wrong with a row.

    Attributes:
        number: The row's number among all rows, from 0.
        text: Where it is, what is wrong and what to do.
    """

    number: int
    text: str


_ALPACA = Fields(("instruction",), ("output",), ("input",))
_STRATEGIES = "tvac_plugin.prompt_strategies"
FIELDS = {
    **dict.fromkeys(("alpaca", "alpaca_chat", "alpaca_instruct"), _ALPACA),
    **dict.fromkeys(("alpaca_chat.load_concise", "alpaca_chat.load_no_prompt"), _ALPACA),
    "alpaca_instruct.load_no_prompt": _ALPACA,
    "alpaca_chat.load_qa": Fields(("question",), ("answer",)),
    "gpteacher": Fields(("instruction",), ("response",), ("input",)),
    "oasst": Fields(("INSTRUCTION",), ("RESPONSE",)),
    "completion": Fields((), ("text",)),
    f"{_STRATEGIES}.beavertails_answers": Fields(("prompt",), ("response",)),
    f"{_STRATEGIES}.beavertails_refusals": Fields(("prompt",), ("refusal",)),
    f"{_STRATEGIES}.sst2": Fields(("sentence",)),
}
"""What is known of `type:` values; of other types' rows only the form is checked."""


def row_problems(
    rows: Iterable[Row], entry: Mapping[str, Any], *, split: str | None, train_on_inputs: bool
) -> Iterator[str]:
    """Says what is wrong with a data set's rows: the first few, then how many more.

    Args:
        rows: All rows of a file, or those that were loaded from it.
        entry: The data set's entry in the recipe, with its `type:`.
        split: The part of `rows` that is used, for example `train[:100]`; `None` for all.
        train_on_inputs: Whether prompts are learned too, so that answers may be absent.
    """
    try:
        check = _RowCheck(entry, train_on_inputs=train_on_inputs)
        found = [problem for index, row in enumerate(rows) for problem in check.problems(index, row)]
    except JsonFileError as error:
        yield str(error)
        return
    if not check.num_rows:
        yield "there is no row in it. Give at least one example."
        return
    try:
        used = range(check.num_rows) if split is None else part_of(split, check.num_rows)
    except ValueError as error:
        yield f"`split: {split}` does not fit ({error}). Use `train`, or a part of it as `train[:100]`."
        return
    if not check.can_be_read:
        yield "`type:` of this data set is missing. Name how its rows are read, for example `type: alpaca`."
        return
    found = sorted(problem for problem in [*found, *check.late_problems()] if problem.number in used)
    yield from (problem.text for problem in found[:_SHOWN])
    if len(found) > _SHOWN:
        yield f"and {len(found) - _SHOWN} more problems like these. Correct or remove these rows."


class _RowCheck:
    """Goes through rows once; what one row means can depend on what others hold."""

    def __init__(self, entry: Mapping[str, Any], *, train_on_inputs: bool) -> None:
        self.num_rows = 0
        self.can_be_read = True
        self._type = entry.get("type")
        self._fields = _fields(entry, train_on_inputs=train_on_inputs)
        self._messages = _Messages(entry) if self._type == "chat_template" else None
        self._drops_system = bool(entry.get("drop_system_message"))
        self._without_system: list[tuple[int, str]] = []
        self._has_system = False

    def problems(self, index: int, row: Row) -> Iterator[Problem]:
        self.num_rows += 1
        what = self._what_is_wrong(index, row)
        if what is not None:
            yield Problem(index, f"{row.place}: {what}")

    def late_problems(self) -> Iterator[Problem]:
        """Rows without the system prompt that others have: the template would be given the word None."""
        if self._has_system and not self._drops_system:
            for index, place in self._without_system:
                yield Problem(index, f"{place}: `system` is null or absent. Give all rows one, or none.")

    def _what_is_wrong(self, index: int, row: Row) -> str | None:
        value = row.value
        if not isinstance(value, Mapping):
            return f"it is {kind_of(value)}, not an object with fields. Write one JSON object per row."
        if value.keys() >= _TOKENIZED:
            return None
        if not self._type:
            self.can_be_read = False
            return None
        if self._messages is not None:
            what = self._messages.what_is_wrong(value)
            self._has_system |= "system" in value
            if what is None and value.get("system") is None and not self._messages.start_with_system(value):
                self._without_system.append((index, row.place))
            return what
        return next(filter(None, (_text_problem(value, name, part) for name, part in self._fields)), None)


class _Messages:
    """What a conversation must hold for `type: chat_template`."""

    def __init__(self, entry: Mapping[str, Any]) -> None:
        mapped = entry.get("message_property_mappings") or {}
        self._field = entry.get("field_messages") or "messages"
        self._role = mapped.get("role") or entry.get("message_field_role") or "role"
        self._content = mapped.get("content") or entry.get("message_field_content") or "content"
        self._flags = {self._role, self._content, entry.get("message_field_training") or "training", "train", "weight"}

    def start_with_system(self, row: Mapping[str, Any]) -> bool:
        """Whether the first message of a row that is right is the system's."""
        messages = row[self._field]
        first = (json.loads(messages) if isinstance(messages, str) else messages)[0]
        return bool(first[self._role] == "system")

    def what_is_wrong(self, row: Mapping[str, Any]) -> str | None:
        messages = row.get(self._field)
        if isinstance(messages, str):
            try:
                messages = json.loads(messages)
            except ValueError:
                return f"`{self._field}` is a text. Write a list of messages."
        if messages is None:
            return f"`{self._field}` is {_absence(row, self._field)}. Correct the row, or set `field_messages:`."
        if not isinstance(messages, list) or not messages:
            return f"`{self._field}` is {kind_of(messages)}. Write a list of at least one message."
        found = (self._message_problem(number, message) for number, message in enumerate(messages, start=1))
        return next(filter(None, found), None)

    def _message_problem(self, number: int, message: Any) -> str | None:
        if not isinstance(message, Mapping):
            return f"message {number} is {kind_of(message)}. Write an object with `{self._role}` and `{self._content}`."
        role, content = message.get(self._role), message.get(self._content)
        if not isinstance(role, str):
            what = _absence(message, self._role) if role is None else kind_of(role)
            return f"`{self._role}` of message {number} is {what}. Write user, assistant or system."
        others = (value for key, value in message.items() if key not in self._flags)
        if content is None and all(value is None for value in others):
            what = _absence(message, self._content)
            return f"`{self._content}` of message {number} is {what}. Write its text, or remove the row."
        is_parts = isinstance(content, list) and all(isinstance(part, Mapping) for part in content)
        if content is None or isinstance(content, str) or is_parts or role == _TOOL_ROLE:
            return None
        return f"`{self._content}` of message {number} is {kind_of(content)}, not a text. {_AS_TEXT}"


def kind_of(value: Any) -> str:
    """What a value is, without saying it: rows may hold what must not be in a log."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "true or false"
    kinds = {str: "a text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    named = kinds.get(type(value), f"a {type(value).__name__}")
    return named if value or not isinstance(value, list | dict | str) else f"an empty {named.split()[1]}"


def _fields(entry: Mapping[str, Any], *, train_on_inputs: bool) -> list[tuple[str, str]]:
    """Columns with the part they play, as named in `Fields`."""
    kind = entry.get("type")
    if isinstance(kind, Mapping):
        names = {part: kind.get(f"field_{part}") or part for part in ("instruction", "output", "input", "system")}
        answers = () if train_on_inputs else (names["output"],)
        fields = Fields((names["instruction"],), answers, (names["input"], names["system"]))
    elif kind == "completion" and entry.get("field"):
        fields = Fields((), (entry["field"],))
    else:
        fields = FIELDS.get(str(kind).partition(":")[0], Fields())
    return [(name, part) for part, names in fields._asdict().items() for name in names]


def _text_problem(row: Mapping[str, Any], name: str, part: str) -> str | None:
    value = row.get(name)
    if isinstance(value, str) or (value is None and part == "optional"):
        return None
    if value is None:
        return f"`{name}` is {_absence(row, name)}. Write its text, remove the row, or correct `type:`."
    if part != "answers" and isinstance(value, int | float) and not isinstance(value, bool):
        return None
    return f"`{name}` is {kind_of(value)}, not a text. {_AS_TEXT}"


def _absence(row: Mapping[str, Any], name: str) -> str:
    return "null" if name in row else f"missing (there are: {', '.join(map(shown, list(row)[:8])) or 'no fields'})"


def part_of(split: str, num_rows: int) -> set[int]:
    """The numbers of the rows, from 0, that `split` takes of a file, which is all called `train`.

    Raises:
        ValueError: It names something else.
    """
    from datasets import ReadInstruction

    try:
        parts = ReadInstruction.from_spec(split).to_absolute({"train": num_rows})
    except (ValueError, AssertionError, KeyError) as error:
        raise ValueError(str(error).strip("'\"").rstrip(".")) from error
    return {index for part in parts for index in range(part.from_ or 0, num_rows if part.to is None else part.to)}
