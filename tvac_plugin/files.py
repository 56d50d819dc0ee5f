"""Files that appear whole or not at all, and their hashes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tvac_plugin.names import local_path

DATA_SUFFIXES = {".jsonl", ".json", ".csv", ".parquet", ".arrow", ".txt"}
"""Endings by which a data set's path is known to be a local file."""


def write_json(path: Path, value: Any) -> None:
    """Writes JSON; a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def sha256(path: Path) -> str:
    """Hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_missing_folder(text: str) -> bool:
    """Whether a model's name can only mean a local folder, and that folder does not exist.

    A name is a path if it looks like one, or if its first part is a folder here.
    """
    path = local_path(text)
    if path is None:
        return True
    is_path = (
        text.startswith((".", "/", "~"))
        or text.count("/") > 1
        or (len(path.parts) > 1 and Path(path.parts[0]).is_dir())
    )
    return is_path and not path.is_dir()
