"""Recipes for models that people use: what their headers say of memory, and the paper's share of layers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tvac_plugin.args import defense_config
from tvac_plugin.planner.fake_model import build_fake_model
from tvac_plugin.planner.mean_cost import heaviest_cost
from tvac_plugin.planner.model_config import load_model_config
from tvac_plugin.planner.step import StepCounter
from tvac_plugin.planner.workload import read_workload
from tvac_plugin.recipes.reading import read_recipe

FOLDER = Path(__file__).parent.parent.parent / "recipes"
MODELS = sorted((FOLDER / "models").glob("*.yml"))
HARDWARE = re.compile(
    r"one GPU with (?P<card>\d+) GB.*--model-config recipes/(?P<shape>[\w/]+\.json).* predicts (?P<peak>[\d.]+) GiB"
)
OF_AN_ADAPTER = {"adapter", "load_in_4bit", "micro_batch_size", "gradient_accumulation_steps", "output_dir"}


def hardware(path):
    header = " ".join(path.read_text().split("\n\n")[0].replace("\n#", " ").split())
    return HARDWARE.search(header)


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_a_quarter_of_the_layers_is_drawn_and_ten_rows_are_a_step(path):
    recipe, shape = read_recipe(path), json.loads((FOLDER / hardware(path)["shape"]).read_text())
    assert defense_config(recipe).num_active_layers == shape["num_hidden_layers"] // 4
    assert recipe["micro_batch_size"] * recipe["gradient_accumulation_steps"] == 10
    assert recipe["attn_implementation"] == ("eager" if "attn_logit_softcapping" in shape else "sdpa")


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_the_predicted_memory_fits_the_named_card(path):
    found = hardware(path)
    assert float(found["peak"]) + 1 <= int(found["card"])


@pytest.mark.parametrize("model", sorted({path.stem.rsplit("_", 1)[0] for path in MODELS}))
def test_both_adapters_train_the_same(model):
    lora, qlora = (read_recipe(FOLDER / "models" / f"{model}_{adapter}.yml") for adapter in ("lora", "qlora"))
    assert {key for key in {*lora, *qlora} if lora.get(key) != qlora.get(key)} <= OF_AN_ADAPTER
    assert (lora["adapter"], qlora["adapter"], qlora["load_in_4bit"]) == ("lora", "qlora", True)


@pytest.mark.slow
@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_the_header_has_the_planner_s_prediction(path):
    recipe, found = read_recipe(path), hardware(path)
    workload = read_workload(recipe)
    model = build_fake_model(load_model_config(recipe, FOLDER / found["shape"]), workload)
    counter = StepCounter(model, workload, {"datasets", "harmful_datasets"})
    cost = heaviest_cost(counter, defense_config(recipe), accumulation=workload.accumulation)
    assert round(cost.peak / 2**30, 2) == pytest.approx(float(found["peak"]), abs=0.011)
