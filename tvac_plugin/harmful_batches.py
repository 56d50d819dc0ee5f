"""Harmful examples in batches that depend on a seed and an index alone, so that a resumed run sees the same ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Row = dict[str, Any]


class HarmfulBatches:
    """Batches of a pool of tokenized harmful examples.

    The pool is gone through in a new seeded order each epoch; batches run over epoch ends. Every process takes its
    own part of each global batch.
    """

    def __init__(
        self,
        pool: Sequence[Row],
        collate: Callable[[list[Row]], dict[str, Any]],
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        """Checks the pool; nothing is loaded until a batch is asked for.

        Raises:
            ValueError: The pool is empty, or has a row without an answer.
        """
        if len(pool) == 0:
            raise ValueError("harmful_datasets: no example was left after loading. Give at least one.")
        for number, row in enumerate(pool):
            if all(label == -100 for label in row["labels"]):
                raise ValueError(
                    f"harmful_datasets: example {number} has no answer to compute a loss on, or the prompt fills "
                    "sequence_len. Give it an answer or raise sequence_len."
                )
        self._pool = pool
        self._collate = collate
        self._batch_size = min(batch_size, max(1, len(pool) // num_processes))
        self._seed = seed
        self._rank = rank
        self._num_processes = num_processes

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The `index`-th batch of this process, collated on the CPU."""
        start = (index * self._num_processes + self._rank) * self._batch_size
        rows = [self._pool[self._row(start + offset)] for offset in range(self._batch_size)]
        return self._collate(rows)

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, len(self._pool))
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        return int(torch.randperm(len(self._pool), generator=generator)[offset])
