"""Prompts with what is known about their answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import datasets

from tvac_plugin.evaluation.recipe import PromptSource
from tvac_plugin.names import local_path

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


def load_prompts(source: PromptSource) -> list[Prompt]:
    """Loads the different prompts of a source, in its order.

    Raises:
        ValueError: The file or the column is missing, or no prompt is left.
    """
    prompts: dict[str, Prompt] = {}
    for row in _rows(source):
        if source.only and any(row.get(key) != value for key, value in source.only.items()):
            continue
        prompt = _prompt(row, source)
        prompts.setdefault(prompt.text, prompt)
        if len(prompts) == source.num_prompts:
            break
    if not prompts:
        raise ValueError(f"prompts: {source.path} has no prompt that fits. Correct `path:`, `split:` or `only:`.")
    return list(prompts.values())


def _rows(source: PromptSource) -> Any:
    path = local_path(source.path)
    if path is None or (path.suffix in _FORMATS and not path.is_file()):
        raise ValueError(f"prompts: {source.path} does not exist. Correct `path:`, it is relative to where you are.")
    if path.suffix in _FORMATS:
        if not path.read_bytes().strip():
            return []
        try:
            return datasets.load_dataset(_FORMATS[path.suffix], data_files=str(path), split=source.split)
        except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
            cause = error.__cause__ or error
            raise ValueError(f"prompts: {path} cannot be read: {cause}. Correct the file.") from error
    try:
        return datasets.load_dataset(source.path, source.subset, split=source.split)
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(
            f"prompts: {source.path} cannot be loaded: {error}. Correct `path:`, `subset:` or `split:`."
        ) from error


def _prompt(row: Mapping[str, Any], source: PromptSource) -> Prompt:
    if source.field not in row:
        raise ValueError(
            f"prompts: {source.path} has no column `{source.field}`. Set `field:` to one of: {', '.join(row)}."
        )
    value = row[source.field]
    if isinstance(value, str):
        return Prompt(value, None, row)
    if not (isinstance(value, list) and value and isinstance(value[0], dict) and "content" in value[0]):
        raise ValueError(
            f"prompts: {source.path} has a row whose `{source.field}` is neither a text nor a list of messages. "
            "Correct the row, or name another `field:`."
        )
    reference = value[-1]["content"] if len(value) > 1 else None
    return Prompt(str(value[0]["content"]), reference, row)
