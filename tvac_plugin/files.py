"""Files that appear whole or not at all, folders that one run has for itself, and hashes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from tvac_plugin.names import local_path

DATA_SUFFIXES = {".jsonl", ".json", ".csv", ".parquet", ".arrow", ".txt"}
"""Endings by which a data set's path is known to be a local file."""

LOCK_FILE = ".safety_defense.lock"
_TEMPORARY = ".tmp"


class OutputError(RuntimeError):
    """A run cannot have its output folder."""


def write_json(path: Path, value: Any) -> None:
    """Writes JSON; a reader sees the old file or the new one, never a part."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """As `write_json`, for any text.

    Raises:
        OSError: It cannot be written; names the file, and nothing of it is left.
    """
    temporary = path.with_name(path.name + _TEMPORARY)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Names `path` and the way out in an `OSError`, which does not say what could not be written."""
    try:
        yield
    except OSError as error:
        reason = f"{error.strerror or error}; make room or mend that, and start it again"
        raise OSError(error.errno, reason, str(path)) from error


def lock_output(folder: Path) -> BaseFileLock:
    """Makes `folder` if need be and keeps other processes' runs out of it until the lock is released.

    The lock ends with the process, however that ends. Within a process it can be taken again.

    Raises:
        OutputError: Another process has it, or nothing can be written there.
    """
    path = folder / LOCK_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=0, is_singleton=True)
        lock.acquire()
        path.write_text(f"{os.getpid()}\n", encoding="utf-8")
    except Timeout as error:
        holder = path.read_text(encoding="utf-8").strip()
        raise OutputError(
            f"{folder}: another run is writing here (process {holder or 'unknown'}). Wait for it, stop it, or set "
            "another `output_dir:`."
        ) from error
    except OSError as error:
        raise OutputError(_unwritable(folder, error.strerror or str(error))) from error
    return lock


def refuse_unwritable(folder: Path) -> None:
    """Looks whether `lock_output` could write to `folder`, and writes nothing.

    Raises:
        OutputError: It is no folder, or the nearest folder that exists may not be written to.
    """
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not place.is_dir():
        reason = os.strerror(errno.ENOTDIR)
    elif not os.access(place, os.W_OK | os.X_OK):
        reason = "Read-only file system" if os.statvfs(place).f_flag & os.ST_RDONLY else os.strerror(errno.EACCES)
    else:
        return
    raise OutputError(_unwritable(folder, f"{place}: {reason}"))


def _unwritable(folder: Path, reason: str) -> str:
    return f"{folder}: nothing can be written here ({reason}). Mend that or set another `output_dir:`."


def checkpoints(run: Path) -> dict[int, Path]:
    """A run's checkpoint folders by step, in order; one of another name, as `checkpoint-best`, is none of them."""
    named = {path: re.fullmatch(r"checkpoint-([0-9]+)", path.name) for path in run.glob("checkpoint-*")}
    found = {int(match[1]): path for path, match in named.items() if match and path.is_dir()}
    return dict(sorted(found.items()))


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
