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
        got = "" if detail["type"] == "value_error" else f" (got {detail['input']!r})"
        sentences.append(f"{where}: {message}{got}." if got else message)
    return sentences
