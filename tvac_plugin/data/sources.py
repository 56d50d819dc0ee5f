"""The content of data sets on this machine, by which a cache of an earlier content is told from theirs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets

from tvac_plugin.boundary.files import sha256
from tvac_plugin.configs.base import DATA_KEYS

_KEYS = ("datasets", "test_datasets", *DATA_KEYS)
_USER_KEYS = ("task_datasets", "harmful_datasets", "disjoint_from")
_PREPARED = "last_run_prepared"
"""Axolotl's own folder for tokenized data."""


def source_hashes(recipe: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of every file or folder that a recipe names as data, by its path there.

    Args:
        recipe: With entries under `datasets`, its likes, and `simulated_user`. Data sets on a hub are left out.
    """
    user = recipe.get("simulated_user") or {}
    entries = [*_entries(recipe, _KEYS), *_entries(user, _USER_KEYS)]
    texts = [str(text) for entry in entries for text in (entry.get("path"), *_data_files(entry)) if text]
    return {text: _content(Path(text).expanduser()) for text in texts if Path(text).expanduser().exists()}


def prepared_folder(recipe: Mapping[str, Any]) -> str:
    """Where a recipe's tokenized data belong: for every content of its files a folder of its own.

    Axolotl finds tokenized data by path and settings, and would train on rows that were removed from the file since.
    """
    contents = json.dumps(source_hashes(recipe), sort_keys=True)
    key = hashlib.sha256(contents.encode()).hexdigest()[:16]
    return str(Path(recipe.get("dataset_prepared_path") or _PREPARED) / f"content-{key}")


@contextmanager
def rows_apart(recipe: Mapping[str, Any], folder: str) -> Iterator[None]:
    """Has `datasets` keep what it reads from files in `folder`; what it reads from a hub alone stays where it was.

    It finds rows that it read before by path and time stamp, and a copied or unpacked file may keep an earlier stamp.
    """
    usual = datasets.config.HF_DATASETS_CACHE
    if source_hashes(recipe):
        datasets.config.HF_DATASETS_CACHE = Path(folder, "rows")
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = usual


def _entries(block: Mapping[str, Any], keys: Iterable[str]) -> list[Mapping[str, Any]]:
    return [entry for key in keys for entry in block.get(key) or []]


def _data_files(entry: Mapping[str, Any]) -> list[Any]:
    files = entry.get("data_files") or []
    return list(files.values()) if isinstance(files, Mapping) else [files] if isinstance(files, str) else list(files)


def _content(path: Path) -> str:
    if path.is_file():
        return sha256(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    parts = [f"{file.relative_to(path).as_posix()} {sha256(file)}" for file in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
