"""Files that appear whole or not at all, folders that one run has for itself, and hashes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.boundary.paths import local_path

DATA_SUFFIXES = {".jsonl", ".json", ".csv", ".parquet", ".arrow", ".txt"}
"""Endings by which a data set's path is known to be a local file."""

LOCK_FILE = ".safety_defense.lock"


def write_json(path: Path, value: Any) -> None:
    """Writes JSON; a reader sees the old file or the new one, never a part."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """As `write_json`, for any text; half a surrogate pair becomes `?`. A link at `path` is replaced, not followed.

    Raises:
        UserError: It cannot be written; nothing of it is left.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("x", encoding="utf-8", errors="replace") as file:
                file.write(text)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_all(folder: Path, files: Mapping[str, str], *, overwrite: bool = False) -> None:
    """Writes texts by their path in a folder; they are complete before the first of them takes its place.

    Raises:
        UserError: One is there already and may not be overwritten, or nothing can be written; nothing is, then.
    """
    there = [name for name in files if os.path.lexists(folder / name)]
    if (there and not overwrite) or any((folder / name).is_dir() for name in there):
        raise UserError(
            f"{folder}: {', '.join(there)} would be overwritten. Give `--overwrite`, or another `--output`."
        )
    refuse_unwritable(folder)
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
        try:
            for root in (partial, folder):
                for name in files:
                    (root / name).parent.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (partial / name).write_text(text, encoding="utf-8", errors="replace")
            for name in files:
                (partial / name).replace(folder / name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Names `path` and the way out where an `OSError` does not say what could not be written.

    Raises:
        UserError: Instead of an `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}. Make room or fix that, and start again.") from error


def lock_output(folder: Path) -> BaseFileLock:
    """Makes `folder` if need be and keeps other processes' runs out of it until the lock is released.

    The lock ends with the process, however that ends. Within a process it can be taken again.

    Raises:
        UserError: Another process has it, or nothing can be written there.
    """
    path = folder / LOCK_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=0, is_singleton=True)
        lock.acquire()
        path.write_text(f"{os.getpid()}\n", encoding="utf-8")
    except Timeout as error:
        holder = path.read_text(encoding="utf-8").strip()
        raise UserError(
            f"{folder}: another run is writing here (process {holder or 'unknown'}). Wait for it, stop it, or set "
            "another `output_dir:`."
        ) from error
    except OSError as error:
        raise UserError(_unwritable(folder, error.strerror or str(error))) from error
    return lock


def refuse_unwritable(folder: Path) -> None:
    """Looks whether `lock_output` could write to `folder`, and writes nothing.

    Raises:
        UserError: It is no folder, or the nearest folder that exists may not be written to.
    """
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not place.is_dir():
        reason = os.strerror(errno.ENOTDIR)
    elif not os.access(place, os.W_OK | os.X_OK):
        reason = "Read-only file system" if os.statvfs(place).f_flag & os.ST_RDONLY else os.strerror(errno.EACCES)
    else:
        return
    raise UserError(_unwritable(folder, f"{place}: {reason}"))


def _unwritable(folder: Path, reason: str) -> str:
    return f"{folder}: nothing can be written here ({reason}). Fix that or set another `output_dir:`."


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
