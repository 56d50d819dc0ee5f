"""What the planner says of whole recipes."""

from __future__ import annotations

import json
from itertools import combinations
from statistics import mean

import pytest
import yaml
from click.testing import CliRunner

from tests.planner.measured import AFTER_THE_DRAW, drawn, planned_counter
from tests.support.models import tiny_model
from tvac_plugin.boundary.errors import UserError
from tvac_plugin.cli import tvac
from tvac_plugin.configs import DEFENSE_CONFIGS
from tvac_plugin.configs.perturbation import TVaccineConfig
from tvac_plugin.planner import make_plan
from tvac_plugin.planner.draws import read_probes
from tvac_plugin.planner.mean_cost import mean_cost
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
    expected = mean_cost(counter, config, accumulation=1)
    assert expected.mean_flops == pytest.approx(mean(cost.flops for cost in each))
    assert expected.mean_saved == pytest.approx(mean(cost.saved for cost in each), rel=0.01)
    assert expected.heaviest.peak == max(cost.peak for cost in each)


@pytest.mark.parametrize("name", DEFENSE_CONFIGS)
def test_a_step_of_every_defense_can_be_counted(name):
    settings = {
        "t_vaccine": {"num_active_layers": 2}, "oasis": {"num_active_layers": 2},
        "tar": {"inner_steps": 2, "tamper_every": 1}, "ctrap": {"collapse_token": "read by no tokenizer here"},
    }  # fmt: skip
    counter = planned_counter("llama", adapter="lora", checkpointing=False, num_hidden_layers=4)
    cost = counter.count(DEFENSE_CONFIGS[name](**settings.get(name, {})))
    assert cost.flops > 0.9 * counter.count(None).flops


def test_a_plan_repeats_itself_and_t_vaccine_costs_less_than_vaccine(recipe):
    plan = make_plan(recipe)
    assert 1 < plan.arms["t_vaccine"].relative_time < plan.arms["vaccine"].relative_time
    assert plan.arms["t_vaccine"].mean_saved < plan.arms["none"].saved
    assert plan == make_plan(recipe)
    arm = plan.arms["none"]
    assert sum(arm.at_peak.values()) == arm.peak
    assert arm.at_peak["optimizer"] == pytest.approx(2 * arm.at_peak["adapters"], rel=0.05)


def probed(path, *probes):
    lines = [{"step": 0, "event": "draw", "layers": [0]}, *({"event": "probe", "probabilities": p} for p in probes)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def of_layers(recipe, layer):
    """A probe after which `layer` is drawn nearly always."""
    others = 0.001
    count = make_plan(recipe).num_layers
    return [1 - others * (count - 1) if i == layer % count else others for i in range(count)]


def test_the_draws_of_a_trace_decide_time_and_memory(recipe, tmp_path):
    recipe = recipe | {"t_vaccine": {"num_active_layers": 1}}
    low, high = (
        make_plan(recipe, draws=probed(tmp_path / "t.jsonl", of_layers(recipe, layer))).arms["t_vaccine"]
        for layer in (0, -1)
    )
    even = make_plan(recipe).arms["t_vaccine"]
    assert low.relative_time > even.relative_time > high.relative_time
    assert low.mean_saved > even.mean_saved > high.mean_saved
    assert low.peak == even.peak == high.peak, "any layer may be drawn once"


def test_even_probabilities_are_uniform_draws(recipe, tmp_path):
    recipe = recipe | {"t_vaccine": {"num_active_layers": 2}}
    even = make_plan(recipe)
    plan = make_plan(recipe, draws=probed(tmp_path / "t.jsonl", *[[1 / even.num_layers] * even.num_layers] * 3))
    assert plan.num_probes == 3
    assert plan.arms["t_vaccine"].relative_time == pytest.approx(even.arms["t_vaccine"].relative_time, rel=0.01)
    assert plan.arms["vaccine"] == even.arms["vaccine"]
    assert "time over draws with the probabilities of 3 probes." in plan_text(plan)
    assert "time over uniform draws." in plan_text(even)


def test_with_top_k_memory_is_that_of_the_layers_that_are_drawn(recipe, tmp_path):
    recipe = recipe | {"t_vaccine": {"num_active_layers": 1, "layer_sampling": "top_k"}}
    trace = probed(tmp_path / "t.jsonl", of_layers(recipe, -1))
    known, unknown = make_plan(recipe, draws=trace).arms["t_vaccine"], make_plan(recipe).arms["t_vaccine"]
    assert known.saved < unknown.saved
    assert known.mean_saved < unknown.mean_saved


def test_a_plan_for_oasis_has_its_choices_and_its_probes(recipe, tmp_path):
    oasis = {"safety_defense": "oasis", "oasis": {"num_active_layers": 1, "probe_steps": 2}}
    trace = probed(tmp_path / "t.jsonl", of_layers(recipe, -1))
    high, any_layer = make_plan(recipe | oasis, draws=trace), make_plan(recipe | oasis)
    assert 1 < high.arms["oasis"].relative_time < any_layer.arms["oasis"].relative_time
    oasis["oasis"] = oasis["oasis"] | {"probe_steps": 100}
    assert make_plan(recipe | oasis).arms["oasis"].relative_time < any_layer.arms["oasis"].relative_time


def test_a_list_of_probabilities_is_one_probe(recipe, tmp_path):
    recipe = recipe | {"t_vaccine": {"num_active_layers": 1}}
    probabilities = of_layers(recipe, 0)
    path = tmp_path / "probabilities.json"
    path.write_text(json.dumps(probabilities))
    trace = probed(tmp_path / "t.jsonl", probabilities)
    assert make_plan(recipe, draws=path) == make_plan(recipe, draws=trace)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("[", "cannot be read"),
        ("", "holds no probe"),
        ('{"event": "draw", "layers": [0]}', "holds no probe"),
        ('{"event": "probe"}', "holds no probe"),
        ("[0, 0]", "not all of its probabilities are numbers from 0 to 1"),
        ("[0.5, -0.5]", "not all of its probabilities are numbers from 0 to 1"),
        ("[true, 0.5]", "not all of its probabilities are numbers from 0 to 1"),
        ('["a", 0.5]', "holds no probe"),
        ("[0.5, NaN]", "not all of its probabilities are numbers from 0 to 1"),
        ("[0.5, 0.5]", "has probabilities of 2 layers"),
    ],
)
def test_a_file_without_draws_for_this_model_is_one_sentence(tmp_path, content, message):
    path = tmp_path / "t.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_probes(path, num_layers=4)
    assert str(caught.value).startswith(f"--draws-from {path}: ")
    assert "Name the" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"safety_defense": "vaccine", "t_vaccine": None}, "vaccine draws no layers. Leave it out."),
        ({}, "with `t_vaccine.layer_sampling: uniform` no probe decides what is drawn. Leave it out."),
    ],
)
def test_draws_for_a_defense_that_no_probe_guides_are_refused(recipe, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        make_plan(recipe | changes, draws=probed(tmp_path / "t.jsonl", [1.0]))


def test_the_command_takes_a_trace(recipe, tmp_path):
    recipe = recipe | {"t_vaccine": {"num_active_layers": 1}}
    path, trace = tmp_path / "recipe.yml", probed(tmp_path / "t.jsonl", of_layers(recipe, 0))
    path.write_text(yaml.safe_dump(recipe))
    result = CliRunner().invoke(tvac, ["plan", str(path), "--draws-from", str(trace)])
    assert result.exit_code == 0, result.output
    assert "draws with the probabilities of 1 probe." in result.output


@pytest.mark.parametrize("scope", ["batch", "sample"])
def test_scores_and_a_rho_that_do_not_depend_on_scale_need_no_more_memory(recipe, scope):
    plain, relative = (
        make_plan(recipe | {"t_vaccine": {"num_active_layers": 3, "rho": 0.1, "rho_scope": scope} | more})
        for more in ({}, {"layer_sampling": "relative_gradient_norm", "rho_scale": "relative"})
    )
    assert relative.arms == plain.arms


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
    with pytest.raises(UserError, match=message):
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
