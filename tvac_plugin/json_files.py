"""Local JSON files read row by row, strictly enough that what is read is what the file's author wrote."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
_SPACE = re.compile(r"[ \t\r\n]*")
_DIGITS = 4000
_AS_UTF_8 = "Save the file as UTF-8."


class JsonFileError(ValueError):
    """A file that holds no rows that can be read; says where, and what to do."""


class Row(NamedTuple):
    """One row.

    Attributes:
        place: Where it is, as `line 3`, or `row 3` in files whose rows are not lines.
        value: What it holds.
    """

    place: str
    value: Any


def json_rows(path: Path) -> Iterator[Row]:
    """Reads JSON Lines, one JSON list, or objects one after the other, whatever the file's ending.

    Args:
        path: A file that is not compressed.

    Raises:
        JsonFileError: It is not UTF-8 or not JSON, or a key is given twice.
    """
    with path.open("rb") as file:
        start = file.read(3)
        if start.startswith(_UTF_16):
            raise JsonFileError(f"line 1 is UTF-16. {_AS_UTF_8}")
        if start != codecs.BOM_UTF8:
            file.seek(0)
        parser = _Parser()
        is_first = True
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            text = _decoded(line, number)
            value = None if is_first and text.lstrip().startswith("[") else parser.line(text, number)
            if value is None:
                rest = text + _decoded(file.read(), number + 1)
                yield from (parser.elements if is_first and rest.lstrip().startswith("[") else parser.objects)(
                    rest, number
                )
                return
            is_first = False
            yield Row(f"line {number}", value)


class _Parser:
    """Python's JSON reader, which alone would keep the last of two equal keys and let half a surrogate pair pass."""

    def __init__(self) -> None:
        self._twice: list[str] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_int=_integer)

    def line(self, text: str, number: int) -> Any:
        """The value on a line; `None` if it is not exactly one."""
        try:
            return self._value(text, _blank(text, 0), f"line {number}", is_alone=True)[0]
        except json.JSONDecodeError:
            return None

    def objects(self, text: str, line: int) -> Iterator[Row]:
        """The objects of a text, however they are broken into lines."""
        start = _blank(text, 0)
        while start < len(text):
            value, end = self._next(text, start, f"line {line}", line)
            yield Row(f"line {line}", value)
            following = _blank(text, end)
            line, start = line + text.count("\n", start, following), following

    def elements(self, text: str, line: int) -> Iterator[Row]:
        """The elements of a list; texts as Axolotl takes them."""
        position, count = _blank(text, _blank(text, 0) + 1), 1
        while text[position : position + 1] != "]" or count > 1:
            value, position = self._next(text, position, f"row {count}", line)
            yield Row(f"row {count}", {"text": value} if isinstance(value, str) else value)
            position, count = _blank(text, position), count + 1
            if text[position : position + 1] != ",":
                break
            position = _blank(text, position + 1)
        if text[position : position + 1] != "]":
            raise _syntax_error(text, position, "the list does not go on or end", line)
        rest = _blank(text, position + 1)
        if rest < len(text):
            raise _syntax_error(text, rest, "more after the list", line)

    def _next(self, text: str, start: int, place: str, line: int) -> tuple[Any, int]:
        try:
            return self._value(text, start, place)
        except json.JSONDecodeError as error:
            if not text[error.pos :].strip() or error.msg.startswith("Unterminated"):
                raise JsonFileError(f"{place} is cut off. Restore or remove it.") from error
            raise _syntax_error(text, error.pos, error.msg.lower(), line) from error

    def _value(self, text: str, start: int, place: str, *, is_alone: bool = False) -> tuple[Any, int]:
        self._twice.clear()
        try:
            value, end = self._decoder.raw_decode(text, start)
        except RecursionError as error:
            raise JsonFileError(f"{place} is nested too deeply. Flatten or remove it.") from error
        if is_alone and _blank(text, end) < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
        if self._twice:
            raise JsonFileError(f"{place} gives `{self._twice[0]}` twice. Remove one.")
        if _HALF_PAIR.search(text, start, end):
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                raise JsonFileError(f"{place} holds half of a surrogate pair. Write the whole character.") from error
        return value, end

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            keys = [key for key, _ in pairs]
            self._twice += [key for key in made if keys.count(key) > 1]
        return made


def _decoded(data: bytes, line: int) -> str:
    nul = data.find(b"\0")
    if nul >= 0:
        line += data.count(b"\n", 0, nul)
        raise JsonFileError(f"line {line} holds a NUL byte, so this is not JSON in UTF-8. {_AS_UTF_8}")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise JsonFileError(f"line {line} is not UTF-8 (byte 0x{data[error.start]:02x}). {_AS_UTF_8}") from error


def _blank(text: str, position: int) -> int:
    """The position after the white space at `position`."""
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _syntax_error(text: str, position: int, what: str, line: int) -> JsonFileError:
    before = text[:position]
    line, column = line + before.count("\n"), position - before.rfind("\n")
    remedy = "Write one JSON object per line, or one list of objects."
    return JsonFileError(f"line {line} is not JSON ({what}, column {column}). {remedy}")


def _integer(digits: str) -> int | float:
    """Python refuses to read longer integers; as a value that is not trained on, any number will do."""
    return int(digits) if len(digits) < _DIGITS else float(digits)
