"""Shared prompts and shared rows are found by their tokens."""

from __future__ import annotations

import pytest

from tvac_plugin.data.fingerprints import data_facts, prompt_keys


def row(prompt, answer):
    return {"input_ids": [*prompt, *answer], "labels": [-100] * len(prompt) + list(answer)}


def test_the_prompt_ends_at_the_first_label():
    keys = prompt_keys([row([1, 2], [3]), row([1, 2], [4, 5]), row([1], [2, 3])])
    assert keys[0] == keys[1] != keys[2]


def test_shared_prompts_are_counted():
    facts = data_facts([row([1], [2]), row([3], [4])], {"harmful_datasets": [row([1], [9]), row([5], [6])]})
    assert facts["shared_prompts"] == 1
    assert facts["datasets"]["rows"] == facts["harmful_datasets"]["rows"] == 2


def test_the_order_of_rows_does_not_matter_but_their_number_does():
    first, second = row([1], [2]), row([3], [4])
    hashes = [data_facts(rows, {})["datasets"]["sha256"] for rows in ([first, second], [second, first], [first])]
    assert hashes[0] == hashes[1] != hashes[2]


def test_training_on_a_harmful_answer_is_refused():
    with pytest.raises(ValueError, match=r"1 rows of harmful_datasets, harmful answer included.*`split:`"):
        data_facts([row([1], [2]), row([3], [4])], {"harmful_datasets": [row([1], [2])]})


def test_rows_without_masked_prompt_are_compared_whole():
    whole = {"input_ids": [1, 2], "labels": [1, 2]}
    assert prompt_keys([whole]) != prompt_keys([{"input_ids": [1, 3], "labels": [1, 3]}])
