"""Every recipe that is shipped is valid, and says what it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tvac_plugin.args import defense_advice, defense_config, simulated_user_config
from tvac_plugin.chain.jobs import ChainPlan
from tvac_plugin.chain.preflight import chain_problems
from tvac_plugin.chain.recipe import read_chain
from tvac_plugin.chain.search import outer_chains
from tvac_plugin.chain.space import open_settings
from tvac_plugin.check import check_recipe
from tvac_plugin.configs import DEFENSE_CONFIGS
from tvac_plugin.configs.base import DATA_KEYS
from tvac_plugin.evaluation.recipe import EvaluateRecipe
from tvac_plugin.recipes.reading import read_recipe

FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(FOLDER.rglob("*.yml"))
TRAINING = [path for path in RECIPES if "base_model" in read_recipe(path)]
EVALUATIONS = [path for path in RECIPES if "harmful_score" in read_recipe(path)]
CHAINS = [path for path in RECIPES if "stages" in read_recipe(path)]


def test_every_recipe_is_of_one_kind():
    assert sorted([*TRAINING, *EVALUATIONS, *CHAINS]) == RECIPES


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_a_training_recipe_is_accepted_by_the_real_schema(path, tmp_path):
    recipe = read_recipe(path)
    base_model = str(tmp_path) if recipe["base_model"].startswith("outputs/") else recipe["base_model"]
    assert check_recipe(recipe | {"base_model": base_model}, with_data=False).problems == []


@pytest.mark.parametrize("path", EVALUATIONS, ids=lambda path: path.stem)
def test_an_evaluation_is_accepted_by_its_schema(path):
    EvaluateRecipe.model_validate(read_recipe(path))


@pytest.mark.parametrize("path", CHAINS, ids=lambda path: path.stem)
def test_a_chain_can_be_planned(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = ["alignment", "retain", "harmful", "refusals", "user_task", "user_harmful"]
    rows += [f"{split}_{asked}" for split in ("validation", "eval") for asked in ("harmful", "benign", "task")]
    for world in ("tiny_world", "english"):
        (tmp_path / "outputs" / world / "base").mkdir(parents=True)
        for name in rows:
            (tmp_path / "outputs" / world / f"{name}.jsonl").touch()
    chain = read_chain(path)
    assert chain_problems(chain) == []
    closed = [chain] if chain.recipe.search is None else outer_chains(chain)
    settings = [item for each in closed for cell, _ in ChainPlan(each).cells for item in cell.items()]
    defenses = {value for key, value in settings if key.endswith("safety_defense")}
    paper = path.stem.split("_")[0] if path.parent.name == "papers" else "t_vaccine"
    assert defenses >= {"none", "tar" if "chain_tar" in path.stem else paper}


@pytest.mark.parametrize("size", ["tiny", "llama"])
def test_tar_starts_from_a_merged_refusing_model_and_retains_benign_rows(size, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jobs = ChainPlan(read_chain(FOLDER / f"chain_tar_{size}.yml")).jobs
    tar = next(job for job in jobs.values() if job.recipe.get("safety_defense") == "tar")
    (merge,) = (jobs[parent] for parent in tar.parents)
    (align,) = (jobs[parent] for parent in merge.parents)
    assert merge.kind == "merge"
    assert tar.recipe["base_model"] == str(merge.output / "merged")
    assert align.recipe["safety_defense"] == "none"
    assert defense_advice(tar.recipe) == []


NOT_COMPARED_YET = {"oasis", "ctrap", "seam", "circuit_breaker", "crl"}
"""Those that comparison.md names as later than its tables; `tar` needs a stage of its own."""


def test_the_comparison_has_every_defense_with_settings_to_choose_and_five_seeds():
    chain = read_recipe(FOLDER / "compare_tiny.yml")
    tuned = [list(arm.values()) for arm in chain["arms"] if open_settings(arm)]
    used = {value for values in tuned for value in values if isinstance(value, str)} - {"none"}
    assert used == DEFENSE_CONFIGS.keys() - {"tar"} - NOT_COMPARED_YET
    assert any("extrapolate.coefficient" in arm for arm in chain["arms"])
    assert len(tuned) == len(chain["arms"]) - 1
    assert chain["search"]["trials"] >= 8
    assert chain["matrix"]["seed"] == [1, 2, 3, 4, 5]
    assert chain["search"]["seed"] not in chain["matrix"]["seed"]


def test_validation_asks_as_the_evaluation_does_and_only_questions_of_its_own():
    ours, theirs = (json.dumps(read_recipe(FOLDER / f"{name}_tiny.yml")) for name in ("validate", "evaluate"))
    assert ours.replace("validation_", "eval_").replace("validate_tiny", "evaluate_tiny") == theirs
    assert ours.count("/validation_") == ours.count(".jsonl")


@pytest.mark.parametrize("size", ["tiny", "llama"])
@pytest.mark.parametrize("name", sorted(DEFENSE_CONFIGS.keys() - {"t_vaccine"}))
def test_every_defense_has_a_recipe_that_differs_in_the_defense_alone(name, size):
    origin = "attack" if name == "lisa" else "tvaccine"
    ours, theirs = (read_recipe(FOLDER / f"{stem}_{size}.yml") for stem in (name, origin))
    assert ours["safety_defense"] == name
    for recipe in (ours, theirs):
        starts_aligned = {"base_model"} if name == "tar" else set()
        for key in {"safety_defense", "output_dir", *starts_aligned, *DATA_KEYS, *DEFENSE_CONFIGS}:
            recipe.pop(key, None)
    assert ours == theirs


@pytest.mark.parametrize("name", DEFENSE_CONFIGS)
def test_switching_the_line_of_the_tiny_recipe_is_enough(name, tmp_path):
    recipe = read_recipe(FOLDER / ("attack_tiny.yml" if name == "lisa" else "tvaccine_tiny.yml"))
    changes = {"base_model": str(tmp_path), "safety_defense": name}
    assert check_recipe(recipe | changes, with_data=False).problems == []


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
