"""Auxiliary batches depend on the seed and the index alone, and pairs are pairs."""

from __future__ import annotations

import pytest
import torch

from tvac_plugin.configs.fine_tuning import LisaConfig
from tvac_plugin.configs.perturbation import TVaccineConfig
from tvac_plugin.configs.unlearning import BoosterConfig, RepNoiseConfig, TARConfig
from tvac_plugin.data.streams import SeededOrder, Streams, pair_by_prompt


def order(size, **options):
    return SeededOrder(size, seed=1, **options)


def row(prompt, *answer):
    return {"input_ids": [*prompt, *answer], "labels": [-100] * len(prompt) + list(answer)}


def rows(size, *, answer):
    return [row([1, number + 10], answer, number + 10) for number in range(size)]


def streams(config, pad_id=0, **data):
    return Streams(config, data, lambda found: {"rows": found}, pad_id=pad_id, seed=1)


def test_an_epoch_shows_every_row_once_in_another_order_each_time():
    source = order(10, batch_size=5)
    first, second = source.rows_of(0) + source.rows_of(1), source.rows_of(2) + source.rows_of(3)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_batches_run_over_the_end_of_an_epoch():
    seen = [number for i in range(5) for number in order(10, batch_size=4).rows_of(i)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))


def test_processes_share_a_global_batch_without_overlap():
    parts = [order(12, batch_size=3, rank=rank, num_processes=2).rows_of(0) for rank in (0, 1)]
    assert len({*parts[0], *parts[1]}) == 6


def test_a_pool_smaller_than_the_batch_gives_a_smaller_batch():
    assert sorted(order(3, batch_size=8).rows_of(0)) == [0, 1, 2]


def test_any_batch_can_be_asked_for_first():
    source = streams(BoosterConfig(batch_size=4), harmful_datasets=rows(10, answer=5))
    assert source.batch("harmful", 7) == [source.batch("harmful", i) for i in range(8)][7]


def test_the_probe_s_pool_ends_at_its_limit():
    config = TVaccineConfig(probe_samples=3, probe_batch_size=8)
    source = streams(config, harmful_datasets=rows(10, answer=5))
    assert len(source.batch("probe", 0)["rows"]) == 3


def test_pairs_share_the_prompt_and_are_padded_to_one_length():
    refusals = [row([1, number + 10], 6) for number in reversed(range(10))]
    source = streams(RepNoiseConfig(batch_size=4), 99, harmful_datasets=rows(10, answer=5), refusal_datasets=refusals)
    harmful, refusal = source.pair("pairs", 3)
    assert harmful["input_ids"].shape == refusal["input_ids"].shape == (4, 4)
    assert (harmful["input_ids"][:, :2] == refusal["input_ids"][:, :2]).all()
    assert (refusal["input_ids"][:, 3] == 99).all()
    assert (refusal["labels"][:, 3] == -100).all()
    assert (refusal["attention_mask"][:, 3] == 0).all()
    assert (harmful["labels"][:, 2] == 5).all()


def test_rows_without_a_partner_and_equal_answers_are_left_out():
    first = [row([1], 5), row([2], 5), row([3], 5), row([1], 7)]
    second = [row([3], 5), row([1], 6), row([1], 8)]
    harmful, refusals = pair_by_prompt(first, second)
    assert harmful == [first[0], first[3]]
    assert refusals == [second[1], second[2]]


def test_data_that_cannot_be_paired_is_refused_with_what_is_needed():
    with pytest.raises(ValueError, match="refusal_datasets: no prompt of harmful_datasets.*Give refusals of the same"):
        streams(RepNoiseConfig(), harmful_datasets=rows(4, answer=5), refusal_datasets=[row([9], 6)])


def test_the_adversary_of_tar_never_sees_the_held_out_rows():
    config = TARConfig(tamper_loss="entropy", held_out=0.3)
    source = streams(config, harmful_datasets=rows(10, answer=5))
    attacked, held_out = (
        {found["input_ids"][1] for i in range(10) for found in source.batch(name, i)["rows"]}
        for name in ("adversary", "tamper")
    )
    assert len(attacked) == 7
    assert len(held_out) == 3
    assert not attacked & held_out
    assert not source.has("benign")


def test_held_out_pairs_stay_held_out_when_some_rows_have_no_refusal():
    refusals = [row([1, number + 10], 6) for number in range(4, 10)]
    source = streams(TARConfig(held_out=0.3), harmful_datasets=rows(10, answer=5), refusal_datasets=refusals)
    attacked = {found["input_ids"][1] for i in range(10) for found in source.batch("adversary", i)["rows"]}
    held_out = {int(ids[1]) for i in range(10) for ids in source.pair("tamper", i).first["input_ids"]}
    assert held_out == {17, 18, 19}
    assert not attacked & held_out


def test_too_few_rows_to_hold_some_out_are_refused():
    with pytest.raises(ValueError, match="1 examples are too few to hold some of them out. Give more"):
        streams(TARConfig(tamper_loss="entropy"), harmful_datasets=rows(1, answer=5))


def test_an_empty_pool_and_a_row_without_answer_are_refused():
    with pytest.raises(ValueError, match=r"alignment_datasets: no example was left.*`alignment_datasets: \[\{path"):
        streams(LisaConfig())
    with pytest.raises(ValueError, match="example 1 has no answer.*raise sequence_len"):
        streams(TVaccineConfig(), harmful_datasets=[*rows(1, answer=5), row([1, 2])])


def test_the_rows_are_shuffled_once_an_epoch(monkeypatch):
    shuffled, permutation = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *a, **k: shuffled.append(a) or permutation(*a, **k))
    source = order(12, batch_size=4)
    for index in range(6):
        source.rows_of(index)
    assert shuffled == [(12,), (12,)]
