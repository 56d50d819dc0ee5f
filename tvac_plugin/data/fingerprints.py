"""What two tokenized data sets share: the same prompts, or whole rows."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Mapping
from typing import Any

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.data.taught_answers import Decode, num_taught

Rows = Iterable[Mapping[str, Any]]


def prompt_keys(rows: Rows) -> list[str]:
    """One hash per row of the tokens before the first one with a label; of all tokens when none is masked."""
    return [_key(_prompt(row)) for row in rows]


def row_keys(rows: Rows) -> list[str]:
    """One hash per row of all its tokens."""
    return [_key(row["input_ids"]) for row in rows]


def num_unlabelled(rows: Rows) -> int:
    """How many rows have no token with a label, so that nothing is learned from them."""
    return sum("labels" in row and max(row["labels"], default=-100) == -100 for row in rows)


def data_facts(training: Rows, others: Mapping[str, Rows], *, decode: Decode | None = None) -> dict[str, Any]:
    """What the manifest says of the data: rows, a hash of all of them whatever their order, and what they share.

    Args:
        training: Tokenized rows of `datasets`, with `input_ids` and `labels`.
        others: The same for the other data that a defense reads, by key of the recipe.
        decode: Text of token ids, without special tokens, by which rows are compared under other templates too.

    Raises:
        UserError: A harmful row, answer and all, is among rows that the model is trained on.
    """
    facts: dict[str, Any] = {key: _summary(rows) for key, rows in {"datasets": training, **others}.items()}
    if "harmful_datasets" not in others:
        return facts
    harmful = set(row_keys(others["harmful_datasets"]))
    for key, rows in {"datasets": training, **others}.items():
        if key == "harmful_datasets":
            continue
        same_rows = len(set(row_keys(rows)) & harmful)
        if not same_rows and decode is not None:
            same_rows = num_taught(rows, others["harmful_datasets"], decode)
        if same_rows:
            raise UserError(
                f"{same_rows} rows of harmful_datasets, harmful answer included, are also in {key}: the model "
                "would be trained to give these answers. Take other rows for one of them, for example with `split:`."
            )
    shared = set(prompt_keys(training)) & set(prompt_keys(others["harmful_datasets"]))
    return facts | {"shared_prompts": len(shared)}


def rows_hash(rows: Rows) -> str:
    """Hash of all tokens of all rows, whatever their order."""
    return _combined(row_keys(rows))


def text_hash(texts: Iterable[str]) -> str:
    """Hash of texts in their order."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def _summary(rows: Rows) -> dict[str, Any]:
    keys = row_keys(rows)
    return {"rows": len(keys), "unlabelled": num_unlabelled(rows), "sha256": _combined(keys)}


def _combined(keys: list[str]) -> str:
    return hashlib.sha256("".join(sorted(keys)).encode()).hexdigest()


def _prompt(row: Mapping[str, Any]) -> list[int]:
    ids, labels = list(row["input_ids"]), row.get("labels")
    first = next((i for i, label in enumerate(labels) if label != -100), 0) if labels is not None else 0
    return ids[:first] or ids


def _key(ids: Iterable[int]) -> str:
    return hashlib.sha256(array("q", ids).tobytes()).hexdigest()
