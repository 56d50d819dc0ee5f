"""Prompts with what is known about their answers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import datasets

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.boundary.paths import local_path
from tvac_plugin.data.jsonl import PlacedRow, json_rows
from tvac_plugin.data.row_checks import kind_of, part_of
from tvac_plugin.evaluation.recipe import PromptSource

_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


class Prompt(NamedTuple):
    """One thing to ask.

    Attributes:
        text: The question.
        reference: The last message's text, for sources that are conversations.
        row: The whole row.
        asked: The question as a model is asked, if it is rewritten.
        prefill: What the answer is made to begin with.
    """

    text: str
    reference: str | None
    row: Mapping[str, Any]
    asked: str | None = None
    prefill: str = ""

    @property
    def facts(self) -> dict[str, str]:
        """How it is asked, where that is not plainly."""
        return {key: value for key, value in (("asked", self.asked), ("prefill", self.prefill)) if value}

    @property
    def whole(self) -> str:
        """All that a model is given of it."""
        return (self.asked or self.text) + (f"\n{self.prefill}" if self.prefill else "")


def load_prompts(
    source: PromptSource, *, key: str = "prompts", need_reference: bool = False, need_columns: Collection[str] = ()
) -> list[Prompt]:
    """Loads the different prompts of a source in its order, or with `keep_repeats` those of all its rows.

    Args:
        source: Where they are.
        key: What to call the source in an error, as `harmful_score.prompts`.
        need_reference: Whether answers are compared with the row's own.
        need_columns: What the rows of at least one prompt must hold.

    Raises:
        UserError: The file or a column is missing, a row is not a prompt, or no prompt is left.
    """
    prompts: dict[str | int, Prompt] = {}
    try:
        for row in _rows(source):
            if not isinstance(row.value, Mapping):
                raise UserError(f"{row.place} is {kind_of(row.value)}. Write one JSON object per row.")
            if source.only and any(row.value.get(name) != value for name, value in source.only.items()):
                continue
            prompt = _prompt(row, source)
            if need_reference and not (prompt.reference or "").strip():
                raise UserError(f"{row.place} has no answer to compare with. Add an assistant's message to it.")
            prompts.setdefault(len(prompts) if source.keep_repeats else prompt.text, prompt)
            if len(prompts) == source.num_prompts:
                break
    except UserError as error:
        raise UserError(f"{key}: {source.path}, {error}") from error
    if not prompts:
        raise UserError(f"{key}: {source.path} has no prompt that fits. Correct `path:`, `split:` or `only:`.")
    for column in need_columns:
        if not any(prompt.row.get(column) for prompt in prompts.values()):
            raise UserError(
                f"{key}: {source.path} has no row with `{column}`, which the judge compares answers with. Add it to "
                "the rows, or use another judge."
            )
    return list(prompts.values())


def _rows(source: PromptSource) -> Iterable[PlacedRow]:
    path = local_path(source.path)
    if path is None or (path.suffix in _FORMATS and not path.is_file()):
        raise UserError("it does not exist. Correct `path:`, it is relative to where you start axolotl.")
    if _FORMATS.get(path.suffix) == "json":
        rows = list(json_rows(path))
        return [rows[index] for index in sorted(part_of(source.split, len(rows)))]
    try:
        if path.suffix in _FORMATS:
            loaded = datasets.load_dataset(_FORMATS[path.suffix], data_files=str(path), split=source.split)
        else:
            loaded = datasets.load_dataset(source.path, source.subset, split=source.split)
    except (RuntimeError, OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        what = error.__cause__ or error
        raise UserError(f"it cannot be loaded: {what}. Correct `path:`, `subset:` or `split:`.") from error
    return (PlacedRow(f"row {number}", value) for number, value in enumerate(loaded, start=1))


def _prompt(row: PlacedRow, source: PromptSource) -> Prompt:
    if source.field not in row.value:
        raise UserError(
            f"{row.place}: there is no column `{source.field}`. Set `field:` to one of: {', '.join(row.value)}."
        )
    value = row.value[source.field]
    if isinstance(value, str):
        return Prompt(value, None, row.value)
    if not (isinstance(value, list) and value and _is_message(value[0]) and _is_message(value[-1])):
        raise UserError(
            f"{row.place}: `{source.field}` is {kind_of(value)}, not a text or a list of messages whose `content` is "
            "text. Correct the row, or name another `field:`."
        )
    reference = value[-1]["content"] if len(value) > 1 else None
    return Prompt(value[0]["content"], reference, row.value)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("content"), str)
