"""Every recipe that is shipped is valid, and says what it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tvac_plugin.args import defense_config
from tvac_plugin.check import check_recipe
from tvac_plugin.recipe import read_recipe

RECIPES = sorted(Path(__file__).parent.parent.joinpath("recipes").glob("*.yml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_accepted_by_the_real_schema(path):
    assert check_recipe(read_recipe(path), with_data=False).problems == []


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
