"""Errors as sentences for the user."""

from __future__ import annotations

from pydantic import ValidationError


def explain(error: Exception, *, block: str | None = None) -> list[str]:
    """Turns an exception into sentences, without pydantic's frame; `block` is the key above what was validated."""
    if not isinstance(error, ValidationError):
        return [str(error) or repr(error)]
    sentences = []
    for detail in error.errors():
        where = ".".join(str(part) for part in (block, *detail["loc"]) if part is not None)
        message = detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "float_type" and _is_number(detail["input"]):
            message = f"YAML reads {detail['input']} as text; write a decimal point and a sign, as 1.0e-4"
        got = "" if detail["type"] == "value_error" else f" (got {detail['input']!r})"
        sentences.append(f"{where}: {message}{got}." if got else message)
    return sentences


def _is_number(value: object) -> bool:
    try:
        return isinstance(value, str) and float(value) is not None
    except ValueError:
        return False
