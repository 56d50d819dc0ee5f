"""Names from recipes that become part of a path, and text from files that is shown in a terminal."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

MAX_NAME = 100
_NAME = re.compile(r"\w[\w .,=+()-]*")
_ODD = re.compile(r"[^\w.,=+-]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_LONGEST_FOLDER = 150


def _file_name(value: str) -> str:
    if _NAME.fullmatch(value) is None or len(value.encode()) > MAX_NAME:
        raise ValueError(
            f"{value[:MAX_NAME]!r} cannot be a name, for files are called after it. Use up to {MAX_NAME} letters, "
            "digits, spaces and . _ - + = , ( ), and begin with a letter or digit."
        )
    return value


def _folder(value: str) -> str:
    if not value.strip() or _CONTROL.search(value):
        raise ValueError(f"{value!r} cannot be a folder. Name one without control characters.")
    return value


FileName = Annotated[str, AfterValidator(_file_name)]
"""A name that files are called after: it can neither leave its folder nor hide in it."""
Folder = Annotated[str, AfterValidator(_folder)]
"""A folder to write to."""


def folder_name(text: str) -> str:
    """One folder's name for any text: without separators, shell characters or control characters, and not too long.

    Different texts get different names, except that `/` reads as `_` and spaces do not count.
    """
    compact = text.replace("/", "_").replace(" ", "")
    plain = _ODD.sub("_", compact).lstrip(".-")
    if plain == compact and len(plain.encode()) <= _LONGEST_FOLDER:
        return plain
    mark = hashlib.sha256(compact.encode(errors="surrogatepass")).hexdigest()[:12]
    return f"{plain.encode()[: _LONGEST_FOLDER - 13].decode(errors='ignore')}-{mark}"


def local_path(text: str) -> Path | None:
    """The path that a recipe's text names; `None` if no file can be called that, or it cannot be reached."""
    try:
        path = Path(text).expanduser()
        path.resolve().exists()
    except (OSError, ValueError, RuntimeError):
        return None
    return path


def printable(text: str) -> str:
    """Text without what would move a terminal's cursor or change its colours; line breaks stay."""
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text)
