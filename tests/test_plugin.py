"""The plugin inside Axolotl: real training of a tiny model in this process."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from tests.support.workspace import PLUGIN, adapter, axolotl_train, trace
from tvac_plugin.boundary.errors import UserError
from tvac_plugin.provenance.manifest import verify

DEFENSE_KEYS = {"safety_defense": None, "harmful_datasets": None, "t_vaccine": None}
KERNELS_OFF = dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel"), False)


def assert_same_adapter(first, second):
    ours, theirs = adapter(first), adapter(second)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_defended_run_leaves_adapter_manifest_and_trace(workspace, tmp_path):
    output = axolotl_train(workspace.recipe(tmp_path / "out"))
    manifest = verify(output, defense="t_vaccine")
    assert manifest["defended_steps"] == 4
    assert manifest["hook_fires"] == 8
    assert manifest["idle_batches"] == 0
    assert manifest["settings"]["rho"] == 1.0
    assert manifest["data"]["datasets"]["rows"] == 24
    assert manifest["data"]["harmful_datasets"]["rows"] == 12
    assert manifest["data"]["shared_prompts"] == 0
    events = [(line["step"], line["event"]) for line in trace(output)]
    assert events == [
        (0, "probe"), (0, "draw"), (1, "step"), (2, "step"), (2, "draw"), (3, "step"), (3, "probe"), (4, "step"),
    ]  # fmt: skip


def test_only_switching_the_line_runs_vaccine(workspace, tmp_path):
    output = axolotl_train(workspace.recipe(tmp_path / "out", safety_defense="vaccine"))
    assert verify(output, defense="vaccine")["hook_fires"] == 16
    with pytest.raises(UserError, match="trained with vaccine, not t_vaccine"):
        verify(output, defense="t_vaccine")


def test_without_safety_defense_the_plugin_changes_nothing(workspace, tmp_path):
    outputs = []
    for name, plugins in (("with", [PLUGIN]), ("without", None)):
        torch.manual_seed(3)
        recipe = workspace.recipe(tmp_path / name, plugins=plugins, **DEFENSE_KEYS, **KERNELS_OFF)
        outputs.append(axolotl_train(recipe))
    assert_same_adapter(*outputs)
    assert not (outputs[0] / "safety_defense.json").exists()
    assert not (outputs[0] / "safety_trace.jsonl").exists()


def test_none_starts_from_the_adapter_of_the_defended_run(workspace, tmp_path):
    outputs = []
    for defense in ("none", "t_vaccine"):
        torch.manual_seed(hash(defense) % 1000)
        recipe = workspace.recipe(tmp_path / defense, safety_defense=defense, learning_rate=1e-30, **KERNELS_OFF)
        outputs.append(axolotl_train(recipe))
    undefended, defended = (adapter(output) for output in outputs)
    for name in undefended:
        torch.testing.assert_close(undefended[name], defended[name], rtol=0, atol=1e-20)
    assert not (outputs[0] / "safety_defense.json").exists()


def test_the_registered_trainer_is_axolotl_s_and_trl_s():
    from axolotl.core.trainers.base import AxolotlTrainer
    from trl import SFTTrainer

    from tvac_plugin.trainers.axolotl import SafetyDefenseAxolotlTrainer

    assert issubclass(SafetyDefenseAxolotlTrainer, AxolotlTrainer)
    assert issubclass(SafetyDefenseAxolotlTrainer, SFTTrainer)


VARIANTS = {
    "accumulation": {"gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "evaluation": {"val_set_size": 0.2, "eval_steps": 2, "save_strategy": None, "save_steps": 2},
    "packing": {"sample_packing": True, "eval_sample_packing": False, "pad_to_sequence_len": True},
    "full fine-tuning": {"adapter": None, "lora_r": None, "lora_alpha": None, "lora_target_modules": None},
    "attention freeze": {"t_vaccine": {"num_active_layers": 2, "freeze": "attention", "rho_scope": "sample"}},
    "bfloat16 weights": {"torch_dtype": "bfloat16"},
    "bfloat16 weights and arithmetic": {"bf16": True},
}


NEWER = {
    "dynamic fine-tuning": {"use_dft": True},
    "adapters in float32": {"lora_fp32_gradients": True, "torch_dtype": "bfloat16"},
    "logs that are not filtered": {"logging_nan_inf_filter": False},
}
"""What only newer versions of Axolotl have; the first key of each is the new one."""


@pytest.mark.parametrize("variant", [*VARIANTS, *NEWER])
def test_features_of_the_host_work(workspace, tmp_path, variant):
    from axolotl.utils.schemas.config import AxolotlInputConfig

    changes = {**VARIANTS, **NEWER}[variant]
    if variant in NEWER and next(iter(changes)) not in AxolotlInputConfig.model_fields:
        pytest.skip("this version of Axolotl does not have it")
    output = axolotl_train(workspace.recipe(tmp_path / "out", **changes))
    manifest = verify(output)
    assert manifest["defended_steps"] == 4
    assert manifest["idle_batches"] == 0
    assert manifest["hook_fires"] == 8 * changes.get("gradient_accumulation_steps", 1)
    losses = [line for line in trace(output) if line["event"] == "step"]
    assert len(losses) == 4
    assert all(line["safety/perturbation_norm"] > 0 for line in losses)


def test_checkpointing_changes_no_weight(workspace, tmp_path):
    outputs = [axolotl_train(workspace.recipe(tmp_path / str(on), gradient_checkpointing=on)) for on in (None, True)]
    assert_same_adapter(*outputs)


def test_metrics_reach_the_trainer_s_log(workspace, tmp_path):
    output = axolotl_train(workspace.recipe(tmp_path / "out", save_strategy="steps", save_steps=4))
    state = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())
    log = state["log_history"][0]
    names = {"safety/clean_loss", "safety/perturbed_loss", "safety/perturbation_norm", "safety/probe_entropy"}
    assert names <= log.keys()
    assert log["safety/perturbation_norm"] == pytest.approx(1.0, rel=1e-4)
    assert log["safety/perturbed_loss"] == pytest.approx(log["loss"], abs=1e-4)
    assert sum(name.startswith("safety/drawn_layer/") for name in log) == 2


def test_accumulated_losses_are_logged_on_the_scale_of_the_trainer_s(workspace, tmp_path):
    recipe = workspace.recipe(tmp_path / "out", gradient_accumulation_steps=3, save_strategy="steps", save_steps=4)
    output = axolotl_train(recipe)
    state = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())
    for log in state["log_history"][:4]:
        assert log["safety/perturbed_loss"] == pytest.approx(log["loss"], abs=1e-3)


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_a_resumed_run_equals_the_uninterrupted_one(workspace, tmp_path, stop):
    changes = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 10}
    changes |= {"gradient_accumulation_steps": 2}
    whole = axolotl_train(workspace.recipe(tmp_path / "whole", **changes))
    resumed = tmp_path / "resumed"
    shutil.copytree(whole / f"checkpoint-{stop}", resumed / f"checkpoint-{stop}")
    shutil.copy(whole / "safety_trace.jsonl", resumed)
    recipe = workspace.recipe(resumed, resume_from_checkpoint=str(resumed / f"checkpoint-{stop}"), **changes)
    axolotl_train(recipe)
    assert_same_adapter(whole, resumed)
    assert trace(whole) == trace(resumed)
    assert (whole / "safety_defense.json").read_text() == (resumed / "safety_defense.json").read_text()


def test_resuming_with_other_settings_or_processes_is_refused(workspace, tmp_path, monkeypatch):
    changes = {"save_strategy": "steps", "save_steps": 2}
    output = axolotl_train(workspace.recipe(tmp_path / "out", **changes))
    changed = workspace.recipe(
        tmp_path / "out",
        t_vaccine={"num_active_layers": 3},
        resume_from_checkpoint=str(output / "checkpoint-2"),
        **changes,
    )
    with pytest.raises(ValueError, match=r"settings.num_active_layers: 2 -> 3; .*Restore these, or start anew"):
        axolotl_train(changed)
    state = output / "checkpoint-2" / "safety_defense_state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"num_processes": 8}))
    monkeypatch.setattr("axolotl.train.setup_model_and_trainer", pytest.fail)
    with pytest.raises(ValueError, match="8 processes trained it and 1 process would go on.*Launch 8 processes, or"):
        axolotl_train(workspace.recipe(output, resume_from_checkpoint=str(output / "checkpoint-2"), **changes))
    assert verify(output)["defended_steps"] == 4


def test_an_automatic_resume_leaves_a_half_written_checkpoint_out(workspace, tmp_path):
    changes = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "logging_steps": 5}
    whole = axolotl_train(workspace.recipe(tmp_path / "whole", **changes))
    resumed = tmp_path / "resumed"
    shutil.copytree(whole, resumed)
    (resumed / "checkpoint-6" / "trainer_state.json").unlink()
    axolotl_train(workspace.recipe(resumed, auto_resume_from_checkpoints=True, **changes))
    assert_same_adapter(whole, resumed)
    assert trace(whole) == trace(resumed)
    assert (whole / "safety_defense.json").read_text() == (resumed / "safety_defense.json").read_text()
    for folder in resumed.glob("checkpoint-*"):
        (folder / "trainer_state.json").unlink()
    axolotl_train(workspace.recipe(resumed, auto_resume_from_checkpoints=True, **changes))
    assert_same_adapter(whole, resumed)
    assert trace(whole) == trace(resumed)


def test_an_undefended_checkpoint_is_not_resumed(workspace, tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 2}
    axolotl_train(workspace.recipe(tmp_path / "out", safety_defense="none", **changes, **KERNELS_OFF))
    with pytest.raises(ValueError, match="the defense cannot go on .*start anew in another `output_dir:`"):
        axolotl_train(workspace.recipe(tmp_path / "out", auto_resume_from_checkpoints=True, **changes))
    assert not (tmp_path / "out" / "safety_defense.json").exists()


def test_packed_runs_resume_exactly_in_the_middle_of_a_later_epoch(workspace, tmp_path):
    changes = {"max_steps": 8, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 10, "logging_steps": 3}
    changes |= {"sample_packing": True, "eval_sample_packing": False, "pad_to_sequence_len": True, "sequence_len": 128}
    changes |= {"micro_batch_size": 1}
    whole = axolotl_train(workspace.recipe(tmp_path / "whole", **changes))
    epochs = json.loads((whole / "checkpoint-7" / "trainer_state.json").read_text())["epoch"]
    assert epochs > 1
    assert epochs % 1
    resumed = tmp_path / "resumed"
    shutil.copytree(whole / "checkpoint-7", resumed / "checkpoint-7")
    shutil.copy(whole / "safety_trace.jsonl", resumed)
    axolotl_train(workspace.recipe(resumed, resume_from_checkpoint=str(resumed / "checkpoint-7"), **changes))
    assert_same_adapter(whole, resumed)
    assert trace(whole) == trace(resumed)
    assert (whole / "safety_defense.json").read_text() == (resumed / "safety_defense.json").read_text()


def test_a_second_run_in_the_same_folder_is_refused_before_the_model_loads(workspace, tmp_path, monkeypatch):
    import fcntl

    from tvac_plugin.boundary.errors import UserError
    from tvac_plugin.boundary.files import LOCK_FILE

    output = tmp_path / "out"
    output.mkdir()
    monkeypatch.setattr("axolotl.train.setup_model_and_trainer", pytest.fail)
    with (output / LOCK_FILE).open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run is writing here"):
            axolotl_train(workspace.recipe(output))


@pytest.mark.parametrize("changes", [{}, {"safety_defense": "none"}, DEFENSE_KEYS | {"datasets": None}])
def test_an_output_folder_that_cannot_be_written_to_is_refused_before_axolotl_logs_there(
    workspace, tmp_path, monkeypatch, changes
):
    if "datasets" in changes:
        user = {"num_samples": 12, "harmful_ratio": 0.0, "task_datasets": workspace.entries("user_task")}
        changes = changes | {"simulated_user": user}
    monkeypatch.setattr("axolotl.cli.config.prepare_debug_log", pytest.fail)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ValueError, match=r"out: nothing can be written here \(.*Fix that or set another `output_dir:`"):
        axolotl_train(workspace.recipe(tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_checkpoints_carry_their_own_manifest(workspace, tmp_path):
    output = axolotl_train(workspace.recipe(tmp_path / "out", save_strategy="steps", save_steps=2))
    assert verify(output / "checkpoint-2")["defended_steps"] == 2


def test_preprocess_loads_the_harmful_data_too(workspace, tmp_path, monkeypatch):
    from axolotl.cli.config import load_cfg
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.dict import DictDefault

    monkeypatch.setenv("AXOLOTL_IS_PREPROCESS", "1")
    cfg = load_cfg(DictDefault(workspace.recipe(tmp_path / "out", dataset_prepared_path=str(tmp_path / "prepared"))))
    assert PluginManager.get_instance().load_datasets(cfg, preprocess=True) is None
    prepared = [path for path in (tmp_path / "prepared").iterdir() if path.is_dir()]
    assert len(prepared) == 1


def test_kernels_and_reentrant_checkpointing_are_switched_off_only_when_unset():
    from axolotl.utils.dict import DictDefault

    from tvac_plugin.plugin import SafetyDefensePlugin

    cfg = DictDefault({"safety_defense": "vaccine", "gradient_checkpointing": True})
    SafetyDefensePlugin().register(cfg)
    assert cfg.lora_mlp_kernel is False
    assert cfg.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert cfg.seed == 42
    undefended = DictDefault({"safety_defense": "none"})
    SafetyDefensePlugin().register(undefended)
    assert undefended.lora_mlp_kernel is False
    assert undefended.seed is None
    own = DictDefault({"safety_defense": "vaccine", "lora_qkv_kernel": True, "seed": 7})
    SafetyDefensePlugin().register(own)
    assert own.lora_mlp_kernel is None
    assert own.lora_qkv_kernel is True
    assert own.seed == 7
    absent = DictDefault({"gradient_checkpointing": True})
    SafetyDefensePlugin().register(absent)
    assert absent == {"gradient_checkpointing": True}
