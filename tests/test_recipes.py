"""Every recipe that is shipped is valid, and says what it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tvac_plugin.args import defense_config, simulated_user_config
from tvac_plugin.chain.jobs import Plan
from tvac_plugin.chain.preflight import plan_problems
from tvac_plugin.chain.recipe import read_chain
from tvac_plugin.check import check_recipe
from tvac_plugin.evaluation.recipe import EvaluateRecipe
from tvac_plugin.recipe import read_recipe

RECIPES = sorted(Path(__file__).parent.parent.joinpath("recipes").glob("*.yml"))


TRAINING = [path for path in RECIPES if "base_model" in read_recipe(path)]
EVALUATIONS = [path for path in RECIPES if path.stem.startswith("evaluate_")]
CHAINS = [path for path in RECIPES if path.stem.startswith("chain_")]


def test_every_recipe_is_of_one_kind():
    assert sorted([*TRAINING, *EVALUATIONS, *CHAINS]) == RECIPES


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_a_training_recipe_is_accepted_by_the_real_schema(path, tmp_path):
    recipe = read_recipe(path)
    base_model = recipe["base_model"] if "meta-llama" in recipe["base_model"] else str(tmp_path)
    assert check_recipe(recipe | {"base_model": base_model}, with_data=False).problems == []


@pytest.mark.parametrize("path", EVALUATIONS, ids=lambda path: path.stem)
def test_an_evaluation_is_accepted_by_its_schema(path):
    EvaluateRecipe.model_validate(read_recipe(path))


@pytest.mark.parametrize("path", CHAINS, ids=lambda path: path.stem)
def test_a_chain_can_be_planned(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "tiny_world" / "base").mkdir(parents=True)
    for name in ("alignment", "harmful", "user_task", "user_harmful", "eval_harmful", "eval_benign", "eval_task"):
        (tmp_path / "outputs" / "tiny_world" / f"{name}.jsonl").touch()
    plan = Plan(read_chain(path))
    assert plan_problems(plan) == []
    assert [cell for cell, _ in plan.cells] == [{"safety_defense": "none"}, {"safety_defense": "t_vaccine"}]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_starts_with_what_a_reader_needs(path):
    header = path.read_text().split("\n\n")[0]
    for part in ("# Run:", "# Hardware:", "# Time:", "# Expect:"):
        assert part in header, part


def test_the_llama_recipe_has_the_settings_of_the_paper_s_main_row():
    recipe = read_recipe(next(path for path in RECIPES if path.stem == "tvaccine_llama"))
    settings = defense_config(recipe).model_dump()
    assert (settings["rho"], settings["num_active_layers"]) == (3.0, 8)
    assert (settings["resample_steps"], settings["probe_steps"], settings["probe_samples"]) == (20, 200, 200)
    training = {"learning_rate": 1e-3, "weight_decay": 0.1, "num_epochs": 20, "sequence_len": 200, "warmup_ratio": 0.1}
    adapter = {"lora_r": 8, "lora_alpha": 4, "lora_dropout": 0.1}
    assert training | adapter == {key: recipe[key] for key in training | adapter}
    assert recipe["micro_batch_size"] * recipe["gradient_accumulation_steps"] == 10


def test_the_llama_attack_has_the_settings_of_the_paper_s_main_row():
    recipe = read_recipe(next(path for path in RECIPES if path.stem == "attack_llama"))
    user = simulated_user_config(recipe)
    assert (user.num_samples, user.num_harmful) == (1000, 100)
    training = {"learning_rate": 1e-5, "num_epochs": 20, "micro_batch_size": 10, "lora_alpha": 1, "sequence_len": 200}
    assert training == {key: recipe[key] for key in training}
