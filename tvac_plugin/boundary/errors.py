"""The one error that users cause, and errors as sentences."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable
from contextlib import suppress
from difflib import get_close_matches

from pydantic import ValidationError

from tvac_plugin.boundary.secrets import LEFT_OUT, is_secret

_NUMBER = re.compile(r"[-+]?\.?\d[\d.]*(e[-+]?\d+)?", re.IGNORECASE)
_BOOLEANS = dict.fromkeys(("yes", "on", "true", "1"), "true") | dict.fromkeys(("no", "off", "false", "0"), "false")
_EXAMPLES = {
    "float_type": "a number, as `{key}: 1.0`",
    "float_parsing": "a number, as `{key}: 1.0`",
    "int_parsing": "a whole number, as `{key}: 2`",
    "int_type": "a whole number, as `{key}: 2`",
    "int_from_float": "a whole number, as `{key}: 2`",
    "bool_type": "`{key}: true` or `{key}: false`",
    "string_type": "a text, as `{key}: text`",
    "list_type": "a list, as `{key}: [...]`",
    "model_type": "its keys indented below `{key}:`",
}
"""What a value of the right type looks like, by pydantic's name for a wrong one."""
_LARGEST_WHOLE = 1e15
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 80, 80


class UserError(ValueError):
    """What a user can put right: its text names the key or the file, and ends in what to do.

    A ValueError, so that pydantic takes it from a validator.
    """


def sentence_of(error: Exception) -> str:
    """Any error in words that end in what to do; what no user causes is called a fault of this package."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ValidationError):
        return "\n".join(explain(error))
    if isinstance(error, OSError):
        return f"{error}. Fix that and run the same command again."
    return (
        f"{type(error).__name__}: {error}\nThis is a fault of tvac-plugin, not yours. `axolotl tvac --debug ...` shows "
        "the traceback; please report it."
    )


def bullets(lines: Iterable[str]) -> str:
    """Sentences as a list, one a line."""
    return "\n".join(f"- {line}" for line in lines)


def explain(error: Exception, *, block: str | None = None) -> list[str]:
    """Turns an exception into sentences, without pydantic's frame; `block` is the key above what was validated."""
    if not isinstance(error, ValidationError):
        return [str(error) or repr(error)]
    sentences = []
    for detail in error.errors():
        where = ".".join(str(part) for part in (block, *detail["loc"]) if part is not None)
        message, got = detail["msg"].removeprefix("Value error, "), detail["input"]
        if detail["type"] == "missing":
            sentences.append(f"{where}: the recipe needs this key. Add it, or look for a misspelt one.")
        elif detail["type"] != "value_error":
            said = LEFT_OUT if is_secret(where) else f"(got {shown(got)})"
            sentences.append(f"{where}: {message} {said}.{_remedy(detail['type'], got, where.rpartition('.')[2])}")
        elif detail["loc"] and str(detail["loc"][0]) not in message:
            sentences.append(f"{detail['loc'][0]}: {message}")
        else:
            sentences.append(message)
    return sentences


def _remedy(kind: str, got: object, key: str) -> str:
    """What to write instead of a value of the wrong type: what the user meant, or one of the right type."""
    if kind not in _EXAMPLES:
        return ""
    meant = _meant(kind, got[0] if isinstance(got, list) and len(got) == 1 else got)
    as_text = " YAML reads it as text." if meant and isinstance(got, str) else ""
    return f"{as_text} Write `{key}: {meant}`." if meant else f" Write {_EXAMPLES[kind].format(key=key)}."


def _meant(kind: str, got: object) -> str | None:
    text = str(got).strip().lower()
    if kind == "bool_type":
        return _BOOLEANS.get(text)
    if isinstance(got, bool) or _NUMBER.fullmatch(text) is None:
        return None
    with suppress(ValueError):
        number = float(text)
        if kind == "float_type":
            return _float(number)
        if kind.startswith("int") and number.is_integer() and abs(number) < _LARGEST_WHOLE:
            return str(int(number))
    return None


def _float(number: float) -> str:
    """As YAML 1.1 reads it as a number: with a point before the exponent."""
    mantissa, exponent, power = repr(number).partition("e")
    return f"{mantissa if '.' in mantissa else mantissa + '.0'}{exponent}{power}"


def shown(value: object) -> str:
    """A value as the user wrote it, shortened and printable."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "a number of too many digits"


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Returns " Did you mean `x`?" for the option that `word` resembles, or the list of all options."""
    names = list(options)
    match = get_close_matches(word.lower().replace("-", "_"), names, n=1, cutoff=0.6)
    return f" Did you mean `{match[0]}`?" if match else f" Use one of: {', '.join(names)}."


def printable(text: str) -> str:
    """Text without what would move a terminal's cursor or change its colours; line breaks stay."""
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text)
