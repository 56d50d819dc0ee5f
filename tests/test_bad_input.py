"""Whatever is in a recipe, it is accepted as it was meant, or refused by a sentence that names the key."""

from __future__ import annotations

import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests import strategies
from tests.hosts import DirectHost
from tests.models import random_batch, random_pair, tiny_model
from tests.strategies import ENTRIES, fuzz
from tvac_plugin.args import DEFENSE_CONFIGS, SafetyDefenseArgs, SimulatedUserConfig, defense_config
from tvac_plugin.chain.recipe import ChainRecipe, Stage, with_value
from tvac_plugin.check import own_problems
from tvac_plugin.defenses import build_defense
from tvac_plugin.defenses.base import Position
from tvac_plugin.evaluation.recipe import Accuracy, EvaluateRecipe, Judged, PromptSource
from tvac_plugin.messages import explain, shown
from tvac_plugin.recipe import RecipeError, kind_problems, near_misses, plugin_problems, read_recipe

WHAT_TO_DO = (
    "Input should|should have|should match|required|Did you mean|Use |Add |Remove |Set |Give |Write |write |give |"
    "Name |List |Keep |Correct "
)


def assert_says_what_to_do(problems, recipe, names):
    for problem in problems:
        assert len(problem) < 1500
        problem.encode()
        assert re.search(WHAT_TO_DO, problem), problem
        written = [str(key) for key in recipe]
        assert any(name in problem for name in [*names, *written]), problem


def problems_of(model, recipe):
    try:
        return model.model_validate(recipe), []
    except ValidationError as error:
        return None, explain(error)


def outcome(function, *arguments):
    """What a function returns, or the sentence it refuses with."""
    try:
        return function(*arguments), None
    except RecipeError as error:
        return None, str(error)


def same(accepted, written):
    """Whether a value was taken as written; only whole numbers become floats, and lists tuples."""
    if isinstance(accepted, float) and type(written) is int:
        return accepted == written
    if isinstance(accepted, tuple):
        return len(accepted) == len(written) and all(map(same, accepted, written))
    return type(accepted) is type(written) and accepted == written


@fuzz(900)
@given(strategies.defenses())
def test_a_block_is_taken_as_written_or_refused_by_name(recipe):
    name = recipe["safety_defense"]
    problems = own_problems(recipe)
    if problems:
        assert_says_what_to_do(problems, recipe[name], [name])
        return
    config = defense_config(recipe)
    assert all(same(getattr(config, key), value) for key, value in recipe[name].items())


@fuzz(500)
@given(strategies.recipes([*SafetyDefenseArgs.model_fields, "rl", "deepspeed", "gradient_checkpointing", "plugins"]))
def test_anything_under_our_keys_is_accepted_or_refused_by_name(recipe):
    problems = own_problems(recipe) + near_misses(recipe) + plugin_problems(recipe) + kind_problems(recipe, "training")
    assert_says_what_to_do(problems, recipe, [*SafetyDefenseArgs.model_fields, "plugin", *DEFENSE_CONFIGS])


@pytest.mark.parametrize(
    "model", [EvaluateRecipe, Judged, Accuracy, PromptSource, ChainRecipe, Stage, SimulatedUserConfig]
)
def test_evaluations_chains_and_users_are_taken_as_written_or_refused_by_name(model):
    @fuzz(100)
    @given(strategies.blocks(model.model_fields))
    def check(recipe):
        accepted, problems = problems_of(model, recipe)
        assert_says_what_to_do(problems, recipe, [*model.model_fields, model.block])
        if accepted is not None:
            for key in recipe.keys() & {
                "seed",
                "num_samples",
                "batch_size",
                "num_prompts",
                "threshold",
                "max_unscored",
            }:
                assert recipe[key] is None or same(getattr(accepted, key), recipe[key])

    check()


@fuzz(300)
@given(st.dictionaries(strategies.keys, strategies.values, max_size=3), st.text("ab:[]{}&*!<'\"\n\t -0", max_size=20))
def test_any_file_is_read_or_refused_by_name(values, noise):
    path = PATHS[0]
    path.write_bytes((yaml.safe_dump(values) + noise).encode("utf-8", "replace"))
    recipe, error = outcome(read_recipe, path)
    if error is None:
        assert isinstance(recipe, dict)
        return
    assert error.startswith(str(path))
    assert re.search(r"(Correct|Write) .+\.$", error, re.DOTALL)


PATHS = []


@pytest.fixture(autouse=True, scope="module")
def _path(tmp_path_factory):
    PATHS.append(tmp_path_factory.mktemp("fuzz") / "recipe.yml")
    yield
    PATHS.clear()


@fuzz(200)
@given(st.text("abc.01-", max_size=8), strategies.values)
def test_a_key_of_a_matrix_finds_its_place_or_is_refused(dotted, value):
    changed, error = outcome(with_value, {"a": {"b": 1}, "c": [1, {"a": 2}], "b": None}, dotted, value)
    assert isinstance(changed, dict) if error is None else dotted in error and "Name a key" in error


BOUNDED = st.integers(1, 3)


@fuzz(60)
@given(st.sampled_from(sorted(DEFENSE_CONFIGS)), st.data())
def test_what_is_accepted_can_take_a_step(name, data):
    fields = DEFENSE_CONFIGS[name].model_fields
    settings = data.draw(st.dictionaries(st.sampled_from(sorted(fields)), BOUNDED, max_size=4))
    for key, options in {"perturb": ["attention", "mlp", "layer"], "freeze": ["layer", "attention", "none"],
                         "rho_scope": ["batch", "sample"], "tamper_loss": ["dpo", "entropy"]}.items():  # fmt: skip
        if key in fields:
            settings[key] = data.draw(st.sampled_from(options))
    settings |= {"inner_steps": 2, "tamper_every": 1} if name == "tar" else {}
    settings |= {"num_active_layers": data.draw(BOUNDED)} if name == "t_vaccine" else {}
    recipe = {"safety_defense": name, name: settings, **dict.fromkeys(
        ("harmful_datasets", "refusal_datasets", "retain_datasets", "alignment_datasets"), ENTRIES)}  # fmt: skip
    if own_problems(recipe):
        return
    config, model = defense_config(recipe), MODEL
    streams = {
        key: [random_pair() if stream.pairs_with else random_batch()] for key, stream in config.streams().items()
    }
    report = build_defense(config, model, seed=1).step(
        DirectHost(model, streams=streams), random_batch(), Position(0, True, 1000)
    )
    model.zero_grad()
    assert report.loss.isfinite()


MODEL = tiny_model(num_hidden_layers=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rho: 1\nrho: 2\n", "`rho:` is given twice"),
        ("a: &a [*a]\n", "line 1: contains itself"),
        ("a: 0x" + "f" * 4000, "line 1: is a number of more than 300 digits"),
        ("a: " + "9" * 5000, "line 1: is a number of more than 300 digits"),
        ("a: 2024-13-45\n", "not valid YAML"),
        ('a: "\\uD800"\n', "lone surrogate"),
        ("a: " + "[" * 3000, "levels of lists and mappings"),
        ("a: !!python/object:os.system x\n", "is not plain data and could run code"),
        ("- a\n", "Write `key: value` lines"),
    ],
)
def test_a_file_that_means_nothing_is_refused_by_name(tmp_path, text, message):
    path = tmp_path / "recipe.yml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=re.escape(message)) as caught:
        read_recipe(path)
    assert str(path) in str(caught.value)


def test_a_merge_may_be_overridden_and_an_alias_used_twice(tmp_path):
    path = tmp_path / "recipe.yml"
    path.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: [*a, *a]\n")
    assert read_recipe(path)["b"] == {"x": 3, "y": 2}


def test_a_quoted_number_is_told_from_a_word():
    for value in ("3", "1e-4"):
        found = own_problems({"safety_defense": "vaccine", "vaccine": {"rho": value}})
        assert f"YAML reads '{value}' as text; write it without quotes" in found[0]
    found = own_problems({"safety_defense": "vaccine", "vaccine": {"rho": "nan"}})
    assert "Input should be a valid number" in found[0]


def test_a_value_in_a_message_is_short_and_printable():
    assert len(shown("x" * 10**6)) < 100
    assert shown(16**5000) == "a number of 20001 bits"
    shown("\ud800").encode()
