"""A world in a folder: built whole or not at all, told from another world, repaired where it is damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.boundary.files import sha256, write_json

INDEX_FILE = "world.json"
_FORMAT = 3


def build_folder(output: Path, settings: Mapping[str, Any], write: Callable[[Path], Mapping[str, Any]]) -> bool:
    """Has `write` fill a folder, unless the same world is there already.

    The folder appears whole or not at all. `world.json` in it lists the settings and the files with their hashes.

    Args:
        output: The folder.
        settings: What tells this world from another, as JSON.
        write: Fills an empty folder; returns what else is to stand in `world.json`.

    Returns:
        Whether anything was written.

    Raises:
        UserError: `output` holds something else, or the world of other settings.
    """
    output = output.resolve()
    if _is_built(output, settings):
        return False
    _check_output(output, settings)
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    facts = write(partial)
    index = {"format": _FORMAT, "settings": dict(settings), **facts, "files": _hashes(partial)}
    write_json(partial / INDEX_FILE, index)
    if output.exists():
        shutil.rmtree(output)
    partial.replace(output)
    return True


def write_rows(folder: Path, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes `<name>.jsonl`, a row a line."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def chat(question: str, answer: str) -> dict[str, Any]:
    """A row in the chat format."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _check_output(output: Path, settings: Mapping[str, Any]) -> None:
    """Accepts a new or empty folder, or a damaged world of these settings with nothing else in it."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    index = _index_of(output)
    if "settings" not in index or not isinstance(index.get("files"), dict):
        raise UserError(f"{output}: exists and is not a world. Name an empty or a new folder.")
    if index["settings"] != settings:
        raise UserError(
            f"{output}: holds another world, and models trained in it need it. Name a new folder, or delete this one."
        )
    strange = sorted(_hashes(output).keys() - index["files"].keys())
    if strange:
        raise UserError(
            f"{output}: the world in it is damaged, and {strange[0]} beside it would be lost. Move what is yours, or "
            "name a new folder."
        )


def _index_of(output: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((output / INDEX_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _is_built(output: Path, settings: Mapping[str, Any]) -> bool:
    index = _index_of(output)
    if index.get("format") != _FORMAT or index.get("settings") != settings:
        return False
    files = index.get("files")
    return isinstance(files, dict) and bool(files) and files.items() <= _hashes(output).items()


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != INDEX_FILE)
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}
