"""Names from recipes that become part of a path."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, StringConstraints

from tvac_plugin.boundary.errors import UserError, shown

_NAME = re.compile(r"\w[\w .,=+()-]{0,99}")
_ODD = re.compile(r"[^\w.,=+-]+")
_LONGEST_FOLDER = 150


def _file_name(value: str) -> str:
    if _NAME.fullmatch(value) is None:
        raise UserError(
            f"{shown(value)} cannot be a name, for files are called after it. Use up to 100 letters, digits, spaces "
            "and . _ - + = , ( ), and begin with a letter or digit."
        )
    return value


FileName = Annotated[str, AfterValidator(_file_name)]
"""A name that files are called after: it can neither leave its folder nor hide in it."""
Folder = Annotated[str, StringConstraints(min_length=1, pattern=r"^\P{Cc}*$")]
"""A folder to write to, without control characters."""


def folder_name(text: str) -> str:
    """One folder's name for any text: without separators, shell characters or control characters, and not too long.

    Different texts get different names, except that `/` reads as `_` and spaces do not count.
    """
    compact = text.replace("/", "_").replace(" ", "")
    plain = _ODD.sub("_", compact).lstrip(".-").encode()
    if plain == compact.encode() and len(plain) <= _LONGEST_FOLDER:
        return compact
    mark = hashlib.sha256(compact.encode()).hexdigest()[:12]
    return f"{plain[: _LONGEST_FOLDER - 13].decode(errors='ignore')}-{mark}"


def local_path(text: str) -> Path | None:
    """The path that a recipe's text names; `None` if no file can be called that, or it cannot be reached."""
    try:
        path = Path(text).expanduser()
        path.resolve().exists()
    except (OSError, ValueError, RuntimeError):
        return None
    return path
