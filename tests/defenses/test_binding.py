"""Before weights are loaded it is known whether a defense can be bound to a model, in the words of training."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, PretrainedConfig

from tests.support.families import FAMILIES, REFUSED
from tests.support.models import tiny_model
from tvac_plugin.configs import DEFENSE_CONFIGS
from tvac_plugin.configs.base import DefenseConfig
from tvac_plugin.defenses import build_defense
from tvac_plugin.defenses.binding import binding_problems

SHAPES = Path(__file__).parents[2] / "recipes" / "shapes"
DEFENSES = [DEFENSE_CONFIGS[name] for name in ("t_vaccine", "rep_noise")]


def problem_of(config, model):
    """What training would say."""
    try:
        build_defense(config, model, seed=0)
    except ValueError as error:
        return str(error)
    return None


def problems(config, model_config):
    return binding_problems(config, model_config, trust_remote_code=False)


@pytest.mark.parametrize("family", [*FAMILIES, *REFUSED])
def test_what_is_said_before_is_what_training_says(family):
    model = tiny_model(family)
    for defense in DEFENSES:
        config = defense(num_active_layers=2) if defense.block == "t_vaccine" else defense()
        said, expected = problems(config, model.config), problem_of(config, model)
        assert [text.removeprefix("base_model: ") for text in said] == ([] if expected is None else [expected])


@pytest.mark.parametrize("name", ["circuit_breaker", "crl"])
def test_a_defense_that_needs_an_adapter_is_bound_to_a_model_under_one(name):
    config = DEFENSE_CONFIGS[name]
    assert problems(config(), tiny_model().config) == []
    assert problems(config(), tiny_model("gpt2").config) == []
    (problem,) = problems(config(layers=[5]), tiny_model().config)
    assert f"{name}.layers: 5 is more than the model's 4 layers" in problem


def test_a_model_of_seven_billion_weights_takes_no_memory_and_little_time():
    config = AutoConfig.from_pretrained(SHAPES / "llama_2_7b.json")
    problems(DEFENSE_CONFIGS["t_vaccine"](), tiny_model().config)
    started = time.process_time()
    assert problems(DEFENSE_CONFIGS["t_vaccine"](), config) == []
    assert time.process_time() - started < 5
    (problem,) = problems(DEFENSE_CONFIGS["t_vaccine"](num_active_layers=33), config)
    assert "t_vaccine.num_active_layers: 33 is more than the model's 32 layers" in problem


def test_nothing_is_said_of_what_cannot_be_told():
    class Own(DefenseConfig):
        block = "own"

    assert problems(Own(), tiny_model().config) == []
    assert problems(DEFENSE_CONFIGS["vaccine"](), PretrainedConfig()) == []
    assert problems(DEFENSE_CONFIGS["vaccine"](), {"model_type": "mamba"}) == []


def test_a_model_s_own_code_runs_only_when_trusted(tmp_path):
    config = tiny_model().config
    (tmp_path / "own.py").write_text("raise SystemExit('ran')\n")
    config.auto_map = {"AutoModelForCausalLM": "own.Model"}
    config._name_or_path = str(tmp_path)
    assert problems(DEFENSE_CONFIGS["vaccine"](), config) == []
    assert torch.get_default_device().type == "cpu"
