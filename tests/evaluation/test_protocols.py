"""A recipe may say whose evaluation it follows; what it sets itself must then agree."""

from __future__ import annotations

import re
from typing import get_args

import pytest

from tvac_plugin.chain.recipe import with_value
from tvac_plugin.evaluation.protocols import PROTOCOLS, ProtocolName, with_protocol
from tvac_plugin.evaluation.recipe import EvaluateRecipe


def recipe(**changes):
    judged = {"judge": "beaver_dam"}
    return {"harmful_score": judged, "accuracy": {"sst2": {"task": "tvac_sst2"}}, "output_dir": "out"} | changes


def accepted(**changes):
    return EvaluateRecipe.model_validate(recipe(**changes))


def test_each_protocol_has_a_name_that_a_recipe_may_write():
    assert set(get_args(ProtocolName)) == PROTOCOLS.keys()


@pytest.mark.parametrize(
    ("name", "only", "rows", "tokens", "items"),
    [
        ("t_vaccine", {"is_safe": False}, 500, 128, 500),
        ("vaccine", {"is_safe": False}, 500, 128, 500),
        ("booster", {"is_safe": False}, 1000, 512, 1000),
        ("lisa", None, 1000, 512, 1000),
    ],
)
def test_a_protocol_says_which_rows_and_how_many(name, only, rows, tokens, items):
    found = accepted(protocol=name)
    source = found.harmful_score.prompts
    assert (source.path, source.split, source.field) == ("PKU-Alignment/BeaverTails", "30k_test", "prompt")
    assert (source.only, source.num_prompts, source.keep_repeats) == (only, rows, True)
    assert (found.harmful_score.max_new_tokens, found.accuracy["sst2"].limit) == (tokens, items)


def test_a_copy_of_the_data_has_its_own_split_and_other_tasks_their_own_items():
    copy = {"judge": "keyword", "prompts": {"path": "rows.jsonl", "field": "question"}}
    found = accepted(protocol="lisa", harmful_score=copy, accuracy={"mmlu": {"task": "mmlu"}}, over_refusal=copy)
    assert (found.harmful_score.prompts.split, found.harmful_score.prompts.field) == ("train", "question")
    assert found.harmful_score.prompts.num_prompts == 1000
    assert found.accuracy["mmlu"].limit is None
    assert found.over_refusal.prompts.num_prompts == 500
    assert "num_prompts" not in copy["prompts"], "the recipe itself stays as it was written"


@pytest.mark.parametrize(
    ("where", "mine", "theirs"),
    [
        ("harmful_score.max_new_tokens", 128, 512),
        ("harmful_score.prompts.num_prompts", 4, 1000),
        ("harmful_score.prompts.keep_repeats", False, True),
        ("harmful_score.prompts.only", {}, {"is_safe": False}),
        ("harmful_score.prompts.split", "30k_train", "30k_test"),
        ("accuracy.sst2.limit", 7, 1000),
    ],
)
def test_a_key_that_contradicts_the_protocol_is_refused_and_both_are_named(where, mine, theirs):
    said = f"{where}: {mine!r} contradicts `protocol: booster`, which has {theirs!r}. Remove one of the two keys."
    with pytest.raises(ValueError, match=re.escape(said)):
        EvaluateRecipe.model_validate(with_value(recipe(protocol="booster"), where, mine))


def test_a_key_that_says_the_same_is_accepted():
    same = {"judge": "keyword", "max_new_tokens": 512}
    assert accepted(protocol="booster", harmful_score=same) == accepted(protocol="booster", harmful_score=same)


def test_a_protocol_about_nothing_or_of_nobody_is_refused():
    only_mmlu = {"accuracy": {"mmlu": {"task": "mmlu"}}, "output_dir": "out"}
    with pytest.raises(ValueError, match="`protocol: lisa` is about nothing here. Add harmful_score:"):
        EvaluateRecipe.model_validate(only_mmlu | {"protocol": "lisa"})
    with pytest.raises(ValueError, match="protocol"):
        accepted(protocol="liza", harmful_score=None)
    assert with_protocol(only_mmlu) is only_mmlu
