"""Prompts with what is known about their answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from tvac_plugin.evaluation.recipe import PromptSource
from tvac_plugin.json_files import JsonFileError, Row, json_rows
from tvac_plugin.names import local_path
from tvac_plugin.rows import kind_of, part_of

_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


class Prompt(NamedTuple):
    """One thing to ask.

    Attributes:
        text: The question.
        reference: The last message's text, for sources that are conversations.
        row: The whole row.
    """

    text: str
    reference: str | None
    row: Mapping[str, Any]


def load_prompts(source: PromptSource, *, key: str = "prompts", need_reference: bool = False) -> list[Prompt]:
    """Loads the different prompts of a source, in its order.

    Args:
        source: Where they are.
        key: What to call the source in an error, as `harmful_score.prompts`.
        need_reference: Whether answers are compared with the row's own.

    Raises:
        ValueError: The file or the column is missing, a row is not a prompt, or no prompt is left.
    """
    prompts: dict[str, Prompt] = {}
    try:
        for row in _rows(source):
            if not isinstance(row.value, Mapping):
                raise _RowError(f"{row.place} is {kind_of(row.value)}. Write one JSON object per row.")
            if source.only and any(row.value.get(name) != value for name, value in source.only.items()):
                continue
            prompt = _prompt(row, source)
            if need_reference and prompt.reference is None:
                raise _RowError(f"{row.place} has no answer to compare with. Add an assistant's message to it.")
            prompts.setdefault(prompt.text, prompt)
            if len(prompts) == source.num_prompts:
                break
    except (_RowError, JsonFileError) as error:
        raise ValueError(f"{key}: {source.path}, {error}") from error
    except _SourceError as error:
        raise ValueError(f"{key}: {source.path} {error}") from error
    if not prompts:
        raise ValueError(f"{key}: {source.path} has no prompt that fits. Correct `path:`, `split:` or `only:`.")
    return list(prompts.values())


class _RowError(ValueError):
    """A row that cannot be asked; says where it is."""


class _SourceError(ValueError):
    """A source that cannot be read; goes on after its name."""


def _rows(source: PromptSource) -> Iterator[Row]:
    path = local_path(source.path)
    if path is None or (path.suffix in _FORMATS and not path.is_file()):
        raise _SourceError("does not exist. Correct `path:`, it is relative to where you are.")
    if _FORMATS.get(path.suffix) == "json":
        return _json_rows(path, source.split)
    try:
        if path.suffix in _FORMATS:
            if not path.read_bytes().strip():
                return iter(())
            loaded = datasets.load_dataset(_FORMATS[path.suffix], data_files=str(path), split=source.split)
        else:
            loaded = datasets.load_dataset(source.path, source.subset, split=source.split)
    except (RuntimeError, OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise _SourceError(
            f"cannot be loaded: {error.__cause__ or error}. Correct `path:`, `subset:` or `split:`."
        ) from error
    return (Row(f"row {number}", value) for number, value in enumerate(loaded, start=1))


def _json_rows(path: Path, split: str) -> Iterator[Row]:
    if split == "train":
        return json_rows(path)
    rows = list(json_rows(path))
    try:
        return iter([rows[index] for index in sorted(part_of(split, len(rows)))])
    except ValueError as error:
        raise _SourceError(f"has no such split ({error}). Use `split: train`, or a part of it.") from error


def _prompt(row: Row, source: PromptSource) -> Prompt:
    if source.field not in row.value:
        raise _RowError(
            f"{row.place}: there is no column `{source.field}`. Set `field:` to one of: {', '.join(row.value)}."
        )
    value = row.value[source.field]
    if isinstance(value, str):
        return Prompt(value, None, row.value)
    if not (isinstance(value, list) and value and _is_message(value[0]) and _is_message(value[-1])):
        raise _RowError(
            f"{row.place}: `{source.field}` is {kind_of(value)}, not a text or a list of messages whose `content` is "
            "text. Correct the row, or name another `field:`."
        )
    reference = value[-1]["content"] if len(value) > 1 else None
    return Prompt(value[0]["content"], reference, row.value)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("content"), str)
