"""Local JSON files read row by row, in which no key is given twice."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from tvac_plugin.boundary.errors import UserError


class PlacedRow(NamedTuple):
    """One row, and where it is: `line 3`, or `row 3` of a list."""

    place: str
    value: Any


def json_rows(path: Path) -> Iterator[PlacedRow]:
    """Reads JSON Lines, one JSON list, or objects one after the other, whatever the file's ending.

    Raises:
        UserError: It is not UTF-8 or not JSON, or a key is given twice; names the line or the row.
    """
    with _naming("the file"):
        text = path.read_bytes().decode("utf-8-sig").rstrip()
        is_list = text.lstrip().startswith("[")
        if is_list:
            json.loads(text)  # commas and brackets; what is between them follows
    begin = re.compile(r"[^\s,\]]" if is_list else r"\S")
    position, end, line = 0, text.find("[") + 1 if is_list else 0, 1
    for number in count(1):
        found = begin.search(text, end)
        if found is None:
            return
        line += text.count("\n", position, found.start())
        position, place = found.start(), f"row {number}" if is_list else f"line {line}"
        with _naming(place):
            value, end = _DECODER.raw_decode(text, position)
        yield PlacedRow(place, {"text": value} if is_list and isinstance(value, str) else value)


@contextmanager
def _naming(place: str) -> Iterator[None]:
    try:
        yield
    except json.JSONDecodeError as error:
        if error.pos == len(error.doc) or error.msg.startswith("Unterminated"):
            raise UserError(f"line {error.lineno} is cut off. Restore or remove it.") from error
        what = f"{error.msg.lower()}, column {error.colno}"
        remedy = "Write one JSON object per line, or one list of objects."
        raise UserError(f"line {error.lineno} is not JSON ({what}). {remedy}") from error
    except UnicodeDecodeError as error:
        line, byte = 1 + error.object.count(b"\n", 0, error.start), error.object[error.start]
        raise UserError(f"line {line} is not UTF-8 (byte 0x{byte:02x}). Save the file as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: {error}. Correct or remove it.") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise UserError(f"it gives `{key}` twice")
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
