"""Batches beside the training data, which depend on a seed and an index alone, so that a resumed run sees the same."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.configs.base import DATA_KEYS, DefenseConfig, Stream, example_entry
from tvac_plugin.data.fingerprints import prompt_keys
from tvac_plugin.model.numerics import seed_of
from tvac_plugin.model.types import Batch, Pair

TokenizedRow = Mapping[str, Any]
TokenizedRows = Sequence[TokenizedRow]
Collate = Callable[[list[Any]], Batch]
_IGNORED = -100


class SeededOrder:
    """Which rows make up a batch: a new seeded order in each epoch, every process its own part of a global batch.

    Batches run over epoch ends.
    """

    def __init__(self, num_rows: int, *, batch_size: int, seed: int, rank: int = 0, num_processes: int = 1) -> None:
        """A pool smaller than one global batch makes the batches smaller."""
        self._num_rows = num_rows
        self._batch_size = min(batch_size, max(1, num_rows // num_processes))
        self._seed = seed
        self._rank = rank
        self._num_processes = num_processes
        self._epoch, self._order = -1, torch.empty(0)

    def rows_of(self, index: int) -> list[int]:
        """The rows of this process's part of the `index`-th batch."""
        start = (index * self._num_processes + self._rank) * self._batch_size
        return [self._row(start + offset) for offset in range(self._batch_size)]

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, self._num_rows)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(seed_of(self._seed, epoch))
            self._epoch, self._order = epoch, torch.randperm(self._num_rows, generator=generator)
        return int(self._order[offset])


class Streams:
    """The batches of all streams that a defense's settings declare."""

    def __init__(
        self,
        config: DefenseConfig,
        rows: Mapping[str, TokenizedRows],
        collate: Collate,
        *,
        pad_id: int,
        seed: int,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        """Checks the rows; nothing is collated until a batch is asked for.

        Args:
            config: The defense's settings.
            rows: Tokenized rows with `labels`, by key of the recipe.
            collate: Makes a batch of unpaired rows, as the trainer does.
            pad_id: Fills up pairs; attention and labels leave it out.
            seed: Of the order.
            rank: This process.
            num_processes: All processes.

        Raises:
            UserError: Data is missing, a row has no answer, or too few rows are left.
        """
        self._collate = collate
        self._pad_id = pad_id
        self._pools: dict[str, tuple[list[TokenizedRow], ...]] = {}
        self._orders: dict[str, SeededOrder] = {}
        for name, stream in config.streams().items():
            if stream.optional and not rows.get(stream.key):
                continue
            self._pools[name] = _pools(stream, rows)
            self._orders[name] = SeededOrder(
                len(self._pools[name][0]),
                batch_size=stream.batch_size,
                seed=seed,
                rank=rank,
                num_processes=num_processes,
            )

    def has(self, name: str) -> bool:
        """Whether the stream called `name` has data."""
        return name in self._pools

    def batch(self, name: str, index: int) -> Batch:
        """The `index`-th batch of this process, collated on the CPU."""
        pool = self._pools[name][0]
        return self._collate([dict(pool[row]) for row in self._orders[name].rows_of(index)])

    def pair(self, name: str, index: int) -> Pair:
        """The `index`-th batch of a paired stream, on the CPU; both sides are padded to one length."""
        chosen = self._orders[name].rows_of(index)
        sides = [[pool[row] for row in chosen] for pool in self._pools[name]]
        length = max(len(row["input_ids"]) for side in sides for row in side)
        first, second = (_padded(side, length, self._pad_id) for side in sides)
        return Pair(first, second)


def pair_by_prompt(first: TokenizedRows, second: TokenizedRows) -> tuple[list[TokenizedRow], list[TokenizedRow]]:
    """Matches rows with the same prompt and different answers, in the order of `first`.

    The i-th row with a prompt meets the i-th of the other side with that prompt; rows without a partner are left out.
    """
    partners: dict[str, list[TokenizedRow]] = defaultdict(list)
    for key, row in zip(prompt_keys(second), second, strict=True):
        partners[key].append(row)
    found = [
        (row, partners[key].pop(0)) for key, row in zip(prompt_keys(first), first, strict=True) if partners.get(key)
    ]
    different = [(one, other) for one, other in found if list(one["input_ids"]) != list(other["input_ids"])]
    return [one for one, _ in different], [other for _, other in different]


def _pools(stream: Stream, rows: Mapping[str, TokenizedRows]) -> tuple[list[TokenizedRow], ...]:
    known = _rows_of(stream.key, rows)[: stream.limit]
    start, end = (round(part * len(known)) for part in stream.share)
    if start == end:
        raise UserError(f"{stream.key}: {len(known)} examples are too few to hold some of them out. Give more.")
    pools: tuple[list[TokenizedRow], ...] = (known[start:end],)
    if stream.pairs_with is not None:
        pools = pair_by_prompt(pools[0], _rows_of(stream.pairs_with, rows))
        if not pools[0]:
            raise UserError(
                f"{stream.pairs_with}: no prompt of {stream.key} is among them, so nothing can be paired. Give "
                f"{DATA_KEYS[stream.pairs_with]}."
            )
    return pools


def _rows_of(key: str, rows: Mapping[str, TokenizedRows]) -> list[TokenizedRow]:
    pool = list(rows.get(key) or [])
    if not pool:
        raise UserError(f"{key}: no example was left after loading. Give at least one, as `{example_entry(key)}`.")
    for number, row in enumerate(pool):
        if all(label == _IGNORED for label in row["labels"]):
            raise UserError(
                f"{key}: example {number} has no answer to compute a loss on, or the prompt fills "
                "sequence_len. Give it an answer or raise sequence_len."
            )
    return pool


def _padded(rows: Sequence[TokenizedRow], length: int, pad_id: int) -> Batch:
    def column(values: Callable[[TokenizedRow], list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([[*values(row), *[fill] * (length - len(row["input_ids"]))] for row in rows])

    return {
        "input_ids": column(lambda row: list(row["input_ids"]), pad_id),
        "attention_mask": column(lambda row: [1] * len(row["input_ids"]), 0),
        "labels": column(lambda row: list(row["labels"]), _IGNORED),
    }
