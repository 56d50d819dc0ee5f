"""Harmful batches depend on the seed and the index alone."""

from __future__ import annotations

import pytest

from tvac_plugin.harmful_batches import HarmfulBatches


def pool(size):
    return [{"input_ids": [i], "labels": [i]} for i in range(size)]


def batches(size, **options):
    return HarmfulBatches(pool(size), lambda rows: [row["labels"][0] for row in rows], seed=1, **options)


def test_an_epoch_shows_every_row_once_in_another_order_each_time():
    source = batches(10, batch_size=5)
    first, second = source[0] + source[1], source[2] + source[3]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_any_batch_can_be_asked_for_first():
    assert batches(10, batch_size=4)[7] == [batches(10, batch_size=4)[i] for i in range(8)][7]


def test_batches_run_over_the_end_of_an_epoch():
    seen = [row for i in range(5) for row in batches(10, batch_size=4)[i]]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))


def test_processes_share_a_global_batch_without_overlap():
    parts = [batches(12, batch_size=3, rank=rank, num_processes=2)[0] for rank in (0, 1)]
    assert len({*parts[0], *parts[1]}) == 6


def test_a_pool_smaller_than_the_batch_gives_a_smaller_batch():
    assert sorted(batches(3, batch_size=8)[0]) == [0, 1, 2]


def test_an_empty_pool_and_a_row_without_answer_are_refused():
    with pytest.raises(ValueError, match="no example was left"):
        batches(0, batch_size=1)
    rows = [*pool(1), {"input_ids": [1, 2], "labels": [-100, -100]}]
    with pytest.raises(ValueError, match="example 1 has no answer.*raise sequence_len"):
        HarmfulBatches(rows, lambda r: {}, batch_size=1, seed=1)
