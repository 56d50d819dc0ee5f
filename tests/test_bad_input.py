"""Whatever is in a recipe, it is accepted as it was meant, or refused by a sentence that names the key."""

from __future__ import annotations

import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.support import strategies
from tests.support.models import random_batch, random_pair, tiny_model
from tests.support.strategies import ENTRIES, fuzz
from tvac_plugin.args import SafetyDefenseArgs, defense_config
from tvac_plugin.boundary.errors import UserError, explain, shown
from tvac_plugin.chain.recipe import ChainRecipe, Stage, with_value
from tvac_plugin.check import own_problems
from tvac_plugin.configs import DEFENSE_CONFIGS
from tvac_plugin.configs.simulated_user import SimulatedUserConfig
from tvac_plugin.defenses import build_defense
from tvac_plugin.defenses.base import Position
from tvac_plugin.defenses.testing import PlainHost
from tvac_plugin.evaluation.recipe import Accuracy, EvaluateRecipe, Judged, PromptSource
from tvac_plugin.recipes.reading import kind_problems, near_misses, plugin_problems, read_recipe

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
    except UserError as error:
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
    problems = (
        own_problems(recipe) + near_misses(recipe) + plugin_problems(recipe) + kind_problems(recipe, "a training")
    )
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
    assert re.search(r"(Correct|Write|Line it up|Indent|Close|Put) .+\.$", error, re.DOTALL)


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
                         "rho_scope": ["batch", "sample"], "rho_scale": ["absolute", "relative"],
                         "tamper_loss": ["dpo", "entropy"]}.items():  # fmt: skip
        if key in fields:
            settings[key] = data.draw(st.sampled_from(options))
    settings |= {"inner_steps": 2, "tamper_every": 1} if name == "tar" else {}
    settings |= {"num_active_layers": data.draw(BOUNDED)} if name in ("t_vaccine", "oasis") else {}
    recipe = {"safety_defense": name, name: settings, **dict.fromkeys(
        ("harmful_datasets", "refusal_datasets", "retain_datasets", "alignment_datasets"), ENTRIES)}  # fmt: skip
    if own_problems(recipe):
        return
    config, model = defense_config(recipe), MODEL
    streams = {
        key: [random_pair() if stream.pairs_with else random_batch()] for key, stream in config.streams().items()
    }
    report = build_defense(config, model, seed=1).step(
        PlainHost(model, streams=streams), random_batch(), Position(0, True, 1000)
    )
    model.zero_grad()
    assert report.loss.isfinite()


MODEL = tiny_model(num_hidden_layers=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rho: 1\nrho: 2\n", "line 2: `rho:` is given twice"),
        ("a: &a [*a]\n", "line 1: it contains itself"),
        ("a: 2024-13-45\n", "not valid YAML"),
        ("a: " + "[" * 3000, "maximum recursion depth"),
        ("a: !!python/object:os.system x\n", "could not determine a constructor"),
        ("- a\n", "Write `key: value` lines"),
    ],
)
def test_a_file_that_means_nothing_is_refused_by_name(tmp_path, text, message):
    path = tmp_path / "recipe.yml"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read_recipe(path)
    assert str(path) in str(caught.value)


def test_a_merge_may_be_overridden_and_an_alias_used_twice(tmp_path):
    path = tmp_path / "recipe.yml"
    path.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: [*a, *a]\n")
    assert read_recipe(path)["b"] == {"x": 3, "y": 2}


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("rho", "3", "(got '3'). YAML reads it as text. Write `rho: 3.0`."),
        ("rho", "1e-5", "(got '1e-5'). YAML reads it as text. Write `rho: 1.0e-05`."),
        ("rho", [3], "(got [3]). Write `rho: 3.0`."),
        ("rho", "three", "(got 'three'). Write a number, as `rho: 1.0`."),
        ("rho", True, "(got True). Write a number, as `rho: 1.0`."),
        ("num_active_layers", 8.0, "(got 8.0). Write `num_active_layers: 8`."),
        ("num_active_layers", 2.5, "(got 2.5). Write a whole number, as `num_active_layers: 2`."),
    ],
)
def test_a_value_of_the_wrong_type_is_answered_with_what_to_write(key, value, remedy):
    (found,) = own_problems({"safety_defense": "t_vaccine", "t_vaccine": {key: value}})
    assert found.startswith(f"t_vaccine.{key}: Input should be a valid")
    assert found.endswith(remedy)
    assert repr(yaml.safe_load(remedy.split("`")[1])[key]) != repr(value)


def test_other_types_are_answered_too():
    user = {"harmful_ratio": 0.0, "drop_overlap": "yes", "task_datasets": {"path": "x"}}
    found = " ".join(own_problems({"simulated_user": user}))
    assert "Write `drop_overlap: true`." in found
    assert "Write a list, as `task_datasets: [...]`." in found
    assert "Write its keys indented below `t_vaccine:`." in " ".join(
        own_problems({"safety_defense": "t_vaccine", "t_vaccine": 3})
    )


@pytest.mark.parametrize("block", ["t_vaccine", "simulated_user", "custom_defense"])
def test_an_empty_block_is_refused(block):
    assert any(f"`{block}:` is empty" in problem for problem in near_misses({block: None, "base_model": "x"}))
    assert near_misses({"t_vaccine": {}}) == []


def test_a_block_s_key_at_the_top_level_is_sent_home():
    wrong = yaml.safe_load("safety_defense: vaccine\nvaccine:\nrho: 3.0\nprobe_steps: 5\nwarmup_ratio: 0.1\nseed: 1\n")
    assert near_misses(wrong) == [
        "`vaccine:` is empty, so its defaults would be used. Write its keys indented below it, or remove the line.",
        "`rho:` is a key of `vaccine:`, and nobody reads it here. Write it indented below `vaccine:`.",
        "`probe_steps:` is a key of `t_vaccine:`, and nobody reads it here. Write it indented below `t_vaccine:`.",
    ]


def test_a_value_in_a_message_is_short_and_printable():
    assert len(shown("x" * 10**6)) < 100
    assert len(shown(10**4000)) < 100
    assert shown(16**5000) == "a number of too many digits"
