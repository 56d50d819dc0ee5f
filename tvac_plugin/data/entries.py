"""Entries of `datasets:` and its like, and the files that they name, looked at before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from axolotl.utils.data.shared import datasets_with_name_generator, load_dataset_with_config
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.datasets import SFTDataset
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError

from tvac_plugin.boundary.errors import UserError, did_you_mean
from tvac_plugin.boundary.files import DATA_SUFFIXES
from tvac_plugin.boundary.paths import local_path
from tvac_plugin.data.jsonl import PlacedRow, json_rows
from tvac_plugin.data.row_checks import row_problems


def entry_problems(
    entries: Sequence[Mapping[str, Any]] | None, *, key: str, train_on_inputs: bool = False
) -> list[str]:
    """Lists what is wrong with entries under a recipe's `key`: unknown keys, missing files, rows that mean nothing."""
    problems = []
    for number, entry in enumerate(entries or []):
        where = f"{key}[{number}]"
        problems += [
            f"{where}: unknown key `{name}`.{did_you_mean(str(name), SFTDataset.model_fields)}"
            for name in entry
            if name not in SFTDataset.model_fields
        ]
        path = entry.get("path")
        if not path:
            problems.append(f"{where}: `path:` is missing. Name a file, a folder or a data set on the hub.")
        elif is_local(str(path)):
            problems += file_problems(entry, where=where, train_on_inputs=train_on_inputs)
    return problems


def file_problems(entry: Mapping[str, Any], *, where: str, train_on_inputs: bool) -> list[str]:
    """Lists what is wrong with a data set on this machine, row by row; `where` is its entry, as `datasets[0]`."""
    path = local_path(str(entry["path"]))
    if path is None or not path.exists():
        return [f"{where}: {entry['path']} does not exist. Correct `path:`, it is relative to where you start axolotl."]
    try:
        if path.is_file() and path.suffix in (".json", ".jsonl"):
            rows, split = json_rows(path), entry.get("split")
        else:
            rows, split = loaded_rows(entry, default_split="test" if where.startswith("test_") else "train"), None
        found = row_problems(rows, entry, split=split, train_on_inputs=train_on_inputs)
    except UserError as error:
        found = [str(error)]
    except Exception as error:  # of any reader that Axolotl picks
        found = [f"it cannot be loaded: {cause_of(error)}. Correct the file, `path:` or `split:`."]
    return [f"{where}: {path}, {problem}" for problem in found]


def is_local(path: str) -> bool:
    """Whether a data set's `path:` can only be a file or a folder here."""
    if "://" in path:
        return False
    found = local_path(path)
    return found is None or path.startswith((".", "/", "~")) or found.suffix in DATA_SUFFIXES or found.exists()


def cause_of(error: BaseException) -> str:
    """What a reader had to say; `datasets` hides it behind a sentence that says nothing."""
    error = (error.__cause__ if isinstance(error, DatasetGenerationError) else None) or error
    said = " ".join(str(error).split())[:300].rstrip(".")
    return said if isinstance(error, ValueError | OSError) and said else f"{type(error).__name__} {said}".strip()


def loaded_rows(entry: Mapping[str, Any], *, default_split: str) -> Iterator[PlacedRow]:
    """The rows of tables, archives and folders, as Axolotl reads them."""
    whole = DictDefault({key: value for key, value in entry.items() if key != "preprocess_shards"})
    for part in datasets_with_name_generator([whole]):
        loaded = load_dataset_with_config(part, False)
        if not isinstance(loaded, Dataset):
            split = part.split if part.split in loaded else default_split
            if split not in loaded:
                raise UserError(f"there is no split `{split}` in it, only {', '.join(loaded)}. Correct `split:`.")
            loaded = loaded[split]
        for number, value in enumerate(loaded, start=1):
            yield PlacedRow(f"row {number}", value)
