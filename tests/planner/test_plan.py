"""What the planner says of whole recipes."""

from __future__ import annotations

import json
from itertools import combinations
from statistics import mean

import pytest
import yaml
from click.testing import CliRunner

from tests.models import tiny_model
from tests.planner.measured import AFTER_THE_DRAW, drawn, planned_counter
from tvac_plugin.args import TVaccineConfig
from tvac_plugin.cli import tvac
from tvac_plugin.planner import PlanError, make_plan
from tvac_plugin.planner.draws import cost_of_draws
from tvac_plugin.planner.plan import GIB
from tvac_plugin.planner.tables import plan_text


@pytest.fixture
def recipe(workspace, tmp_path):
    return workspace.recipe(
        tmp_path / "out",
        sequence_len=32,
        micro_batch_size=4,
        optimizer="adamw_torch_fused",
        t_vaccine={"num_active_layers": 3, "layer_sampling": "uniform"},
    )


def test_the_expectation_is_that_of_all_draws():
    counter = planned_counter("llama", adapter="lora", checkpointing=False, num_hidden_layers=4)
    config = TVaccineConfig(num_active_layers=2, layer_sampling="uniform")
    each = [
        counter.count(config, position=AFTER_THE_DRAW, state=drawn(*layers)) for layers in combinations(range(4), 2)
    ]
    expected = cost_of_draws(counter, config, accumulation=1)
    assert expected.mean_flops == pytest.approx(mean(cost.flops for cost in each))
    assert expected.mean_saved == pytest.approx(mean(cost.saved for cost in each), rel=0.01)
    assert expected.worst.peak == max(cost.peak for cost in each)


def test_a_plan_repeats_itself_and_t_vaccine_costs_less_than_vaccine(recipe):
    plan = make_plan(recipe)
    assert 1 < plan.arms["t_vaccine"].relative_time < plan.arms["vaccine"].relative_time
    assert plan.arms["t_vaccine"].mean_saved < plan.arms["none"].saved
    assert plan == make_plan(recipe)
    arm = plan.arms["none"]
    assert sum(arm.at_peak.values()) == arm.peak
    assert arm.at_peak["optimizer"] == pytest.approx(2 * arm.at_peak["adapters"], rel=0.05)


def test_what_does_not_fit_ends_in_settings_that_do(recipe):
    recipe = {**recipe, "safety_defense": "vaccine", "vaccine": {}}
    needed = make_plan(recipe).arms["vaccine"].peak
    plan = make_plan(recipe, gpu=needed - 1, reserve=0)
    assert plan.fits is False
    assert plan.remedies[-1].fits
    changed = make_plan({**recipe, **plan.remedies[-1].changes}, gpu=needed - 1, reserve=0)
    assert changed.fits
    assert changed.arms["vaccine"].peak == plan.remedies[-1].peak


def test_fewer_answer_tokens_need_less_in_a_defended_run_alone(recipe):
    recipe = {**recipe, "safety_defense": "vaccine", "vaccine": {}}
    whole, half = make_plan(recipe), make_plan(recipe, answer_share=0.5)
    assert half.arms["vaccine"].peak < whole.arms["vaccine"].peak
    assert half.arms["none"].peak == whole.arms["none"].peak


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model": "nobody/has-this"}, "hf download nobody/has-this config.json"),
        ({"load_in_8bit": True}, "load_in_8bit: 8-bit weights are not counted"),
        ({"adapter": "qlora"}, "Add `load_in_4bit: true`"),
        ({"micro_batch_size": 0}, "micro_batch_size: must be a whole number"),
        ({"optimizer": "no_such"}, "Plan with adamw_torch_fused"),
    ],
)
def test_what_cannot_be_planned_says_why(recipe, changes, message):
    with pytest.raises(PlanError, match=message):
        make_plan({**recipe, **changes})


def test_the_command_needs_no_data_and_takes_a_shape(recipe, tmp_path):
    tiny_model("qwen3").config.to_json_file(tmp_path / "shape.json")
    recipe |= {"base_model": "nobody/has-this", "datasets": [{"path": "gone.jsonl", "type": "alpaca"}]}
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe))
    shape = ["--model-config", str(tmp_path / "shape.json")]
    result = CliRunner().invoke(
        tvac, ["plan", str(path), "--gpu", "24GB", *shape, "--output", str(tmp_path / "plan.json")]
    )
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "plan.json").read_text())["fits"] is True
    result = CliRunner().invoke(tvac, ["plan", str(path), "--gpu", "a lot"])
    assert "Write a number and GB or MB" in result.output


def test_the_text_names_the_peak_and_the_verdict(recipe):
    text = plan_text(make_plan({**recipe, "safety_defense": "none"}, gpu=24 * GIB))
    assert "none fits" in text
    assert "saved activations" in text


def test_a_misspelt_block_is_refused_as_check_does(recipe, tmp_path):
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump({**recipe, "t_vaccine": {"num_active_layer": 2}}))
    result = CliRunner().invoke(tvac, ["plan", str(path)])
    assert result.exit_code == 1
    assert "Did you mean `num_active_layers`" in result.output
