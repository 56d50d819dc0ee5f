"""Errors as sentences for the user."""

from __future__ import annotations

import math
import reprlib

from pydantic import ValidationError

from tvac_plugin.secrecy import LEFT_OUT, is_secret

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 80, 80


def explain(error: Exception, *, block: str | None = None) -> list[str]:
    """Turns an exception into sentences, without pydantic's frame; `block` is the key above what was validated."""
    if not isinstance(error, ValidationError):
        return [str(error) or repr(error)]
    sentences = []
    for detail in error.errors():
        where = ".".join(str(part) for part in (block, *detail["loc"]) if part is not None)
        message = detail["msg"].removeprefix("Value error, ")
        if detail["type"] in ("float_type", "int_type") and _is_number(detail["input"]):
            message = f"YAML reads {shown(detail['input'])} as text; write it without quotes, and 1e-4 as 1.0e-4"
        if detail["type"] == "missing":
            sentences.append(f"{where}: the recipe needs this key. Add it, or look for a misspelt one.")
        elif detail["type"] != "value_error":
            got = LEFT_OUT if is_secret(where) else f"(got {shown(detail['input'])})"
            sentences.append(f"{where}: {message} {got}.")
        elif detail["loc"] and str(detail["loc"][0]) not in message:
            sentences.append(f"{detail['loc'][0]}: {message}")
        else:
            sentences.append(message)
    return sentences


def shown(value: object) -> str:
    """A value as the user wrote it, shortened and printable, whatever it is."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    return _SHORT.repr(value).encode("utf-8", "backslashreplace").decode()


def _is_number(value: object) -> bool:
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False
