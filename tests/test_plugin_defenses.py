"""Every defense behind the same line, inside Axolotl: real training of a tiny model in this process."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from tests.support.workspace import adapter, axolotl_train, trace
from tvac_plugin.chain.results import training_losses
from tvac_plugin.configs import DEFENSE_CONFIGS
from tvac_plugin.provenance.manifest import verify

SETTINGS = {
    "random_noise": {"rho": 1.0},
    "vaccine": {"rho": 1.0},
    "oasis": {"rho": 1.0, "num_active_layers": 2, "probe_steps": 2, "probe_batch_size": 2},
    "rep_noise": {"batch_size": 2},
    "tar": {"inner_steps": 3, "tamper_every": 2, "adversary_learning_rates": [1e-3], "batch_size": 2},
    "booster": {"batch_size": 2},
    "ctrap": {"batch_size": 2, "collapse_token": "cannot"},
    "circuit_breaker": {"batch_size": 2},
    "crl": {"batch_size": 2},
    "seam": {"batch_size": 2},
}
ALIGNMENT = ["t_vaccine", *SETTINGS]
METRICS = {
    "t_vaccine": "perturbation_norm",
    "vaccine": "perturbation_norm",
    "oasis": "perturbation_norm",
    "random_noise": "perturbation_norm",
    "rep_noise": "regularizer_norm",
    "tar": "tamper_norm",
    "booster": "regularizer_norm",
    "ctrap": "regularizer_norm",
    "circuit_breaker": "reroute_norm",
    "crl": "regularizer_norm",
    "seam": "self_destruct_norm",
    "lisa": "pull_norm",
}


def recipe(workspace, output, name, **changes):
    """The same recipe for every defense, but for the line that names it."""
    data = {"refusal_datasets": workspace.entries("refusals"), "retain_datasets": workspace.entries("retain")}
    shared = {**data, **SETTINGS}
    return workspace.recipe(output, **{**shared, "safety_defense": name, **changes})


def attack(workspace, output, **changes):
    """A user's fine-tuning under Lisa."""
    user = {
        "num_samples": 12,
        "harmful_ratio": 0.25,
        "task_datasets": workspace.entries("user_task"),
        "harmful_datasets": workspace.entries("user_harmful"),
    }
    settings = {
        "safety_defense": "lisa",
        "simulated_user": user,
        "alignment_datasets": workspace.entries("alignment"),
        "lisa": {"alignment_steps": 1, "user_steps": 2, "warmup_ratio": 0.0, "batch_size": 2},
        "datasets": None,
        "harmful_datasets": None,
        "t_vaccine": None,
    }
    return workspace.recipe(output, **settings | changes)


def any_recipe(workspace, output, name, **changes):
    build = attack if name == "lisa" else recipe
    return build(workspace, output, **(changes if name == "lisa" else {"name": name, **changes}))


def test_every_defense_is_covered():
    assert {*ALIGNMENT, "lisa"} == DEFENSE_CONFIGS.keys() == METRICS.keys()


@pytest.mark.parametrize("name", ALIGNMENT)
def test_only_switching_the_line_runs_another_defense(workspace, tmp_path, name):
    output = axolotl_train(recipe(workspace, tmp_path / "out", name))
    manifest = verify(output, defense=name)
    assert manifest["defended_steps"] == 4
    steps = [line for line in trace(output) if line["event"] == "step"]
    assert len(steps) == 4
    assert all(line[f"safety/{METRICS[name]}"] > 0 for line in steps[1:])
    assert [step for step, loss in training_losses(output) if loss > 0] == [1, 2, 3, 4]
    read = DEFENSE_CONFIGS[name](**(SETTINGS.get(name) or {})).data_keys().keys()
    assert manifest["data"].keys() - {"shared_prompts", "sources"} == {"datasets", *read}


@pytest.mark.parametrize("name", [*SETTINGS, "lisa"])
def test_a_resumed_run_equals_the_uninterrupted_one(workspace, tmp_path, name):
    changes = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 10}
    changes |= {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    whole = axolotl_train(any_recipe(workspace, tmp_path / "whole", name, **changes))
    resumed = tmp_path / "resumed"
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    shutil.copy(whole / "safety_trace.jsonl", resumed)
    changes["resume_from_checkpoint"] = str(resumed / "checkpoint-2")
    axolotl_train(any_recipe(workspace, resumed, name, **changes))
    ours, theirs = adapter(whole), adapter(resumed)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert trace(whole) == trace(resumed)
    assert (whole / "safety_defense.json").read_text() == (resumed / "safety_defense.json").read_text()


@pytest.mark.parametrize("name", SETTINGS)
def test_packing_and_bfloat16_work(workspace, tmp_path, name):
    changes = {"sample_packing": True, "eval_sample_packing": False, "pad_to_sequence_len": True}
    output = axolotl_train(recipe(workspace, tmp_path / "out", name, torch_dtype="bfloat16", **changes))
    manifest = verify(output, defense=name)
    assert manifest["defended_steps"] == 4
    assert manifest["idle_batches"] == 0
    assert all(torch.isfinite(tensor).all() for tensor in adapter(output).values())


@pytest.mark.parametrize("name", ["t_vaccine", *SETTINGS])
def test_a_strength_of_zero_is_refused_before_training(workspace, tmp_path, name):
    keys = {"rep_noise": ["alpha", "beta"], "tar": ["tamper_scale"], "booster": ["regularizer_scale"]}
    keys |= {"ctrap": ["collapse_scale"], "circuit_breaker": ["alpha"], "crl": ["harmful_scale"]}
    keys |= {"seam": ["unlearning_scale", "self_destruct_scale"]}
    weak = dict.fromkeys(keys.get(name, ["rho"]), 0.0)
    with pytest.raises(ValueError, match=rf"{name}\.\w+: 0.*nothing would be defended. Set .* 0.001 or more"):
        axolotl_train(recipe(workspace, tmp_path / "out", name, **{name: weak}))
    assert not (tmp_path / "out").exists()


def test_a_collapse_token_that_is_not_one_is_refused_before_the_model_loads(workspace, tmp_path, monkeypatch):
    monkeypatch.setattr("axolotl.loaders.ModelLoader.load", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(
        ValueError, match=r"ctrap.collapse_token: 'i cannot' is 2 tokens \('i', 'cannot'\), and it must"
    ):
        axolotl_train(recipe(workspace, tmp_path / "out", "ctrap", ctrap={"collapse_token": "i cannot"}))
    with pytest.raises(ValueError, match=r"ctrap.collapse_token: 9999 is not among the \d+ tokens of the model. Give"):
        axolotl_train(recipe(workspace, tmp_path / "out", "ctrap", ctrap={"collapse_token": 9999}))


def test_the_trace_says_which_token_the_collapse_is(workspace, tmp_path):
    output = axolotl_train(recipe(workspace, tmp_path / "out", "ctrap", max_steps=2))
    vocabulary = json.loads((output / "tokenizer.json").read_text())["model"]["vocab"]
    (event,) = (line for line in trace(output) if line["event"] == "collapse_token")
    assert event["token"] == vocabulary["cannot"]


@pytest.mark.parametrize("name", ["circuit_breaker", "crl"])
def test_a_model_without_an_adapter_is_refused_before_it_loads(workspace, tmp_path, monkeypatch, name):
    monkeypatch.setattr("axolotl.train.setup_model_and_tokenizer", pytest.fail)
    lora = dict.fromkeys(("adapter", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"))
    with pytest.raises(ValueError, match="`adapter` must name one: .* Add `adapter: lora`"):
        axolotl_train(recipe(workspace, tmp_path / "out", name, **lora))


def test_lisa_defends_a_simulated_user_s_fine_tuning(workspace, tmp_path, monkeypatch):
    def gone():
        raise ValueError("there is no process group any more")

    asked_late = ("tvac_plugin.plugin.is_main_process", gone)
    monkeypatch.setattr("axolotl.train.cleanup_distributed", lambda: monkeypatch.setattr(*asked_late))
    output = axolotl_train(attack(workspace, tmp_path / "out", max_steps=6))
    manifest = verify(output, defense="lisa")
    assert (manifest["steps"], manifest["defended_steps"]) == (6, 4), "no pull at steps 1 and 4, where a state begins"
    user = json.loads((output / "simulated_user.json").read_text())
    assert (user["task_rows"], user["harmful_rows"]) == (9, 3) if "task_rows" in user else user
    states = [(line["step"], line["state"]) for line in trace(output) if line["event"] == "state"]
    assert states == [(0, "alignment"), (1, "user"), (3, "alignment"), (4, "user")]


def test_a_damaged_state_is_one_sentence(workspace, tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 2}
    output = axolotl_train(attack(workspace, tmp_path / "out", **changes))
    state = output / "checkpoint-2" / "safety_defense_state.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    again = attack(workspace, tmp_path / "out", resume_from_checkpoint=str(output / "checkpoint-2"), **changes)
    with pytest.raises(ValueError, match="the defense's state in it is damaged .*Resume from an earlier checkpoint"):
        axolotl_train(again)
