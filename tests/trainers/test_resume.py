"""A run that is killed anywhere and resumed leaves the files of one that was not."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
import transformers.trainer

from tests.support.sft_runs import WORLD, At, DriftConfig, build, chats, contents, finish, in_child, kill, logs
from tvac_plugin.configs.collapse import CTRAPConfig, SEAMConfig
from tvac_plugin.configs.fine_tuning import LisaConfig
from tvac_plugin.configs.perturbation import OASISConfig, RandomNoiseConfig, TVaccineConfig, VaccineConfig
from tvac_plugin.configs.representations import CircuitBreakerConfig, CRLConfig
from tvac_plugin.configs.unlearning import BoosterConfig, RepNoiseConfig, TARConfig
from tvac_plugin.defenses import TVaccine
from tvac_plugin.trainers import checkpoint, mixin

T_VACCINE = {"rho": 0.5, "num_active_layers": 2, "resample_steps": 2, "probe_steps": 3, "probe_batch_size": 3}
DEFENSES = {
    "gradient_norm, layer": TVaccineConfig(**T_VACCINE),
    "top_k, attention": TVaccineConfig(**T_VACCINE, layer_sampling="top_k", freeze="attention"),
    "uniform, none": TVaccineConfig(**T_VACCINE, layer_sampling="uniform", freeze="none", rho_scope="sample"),
    "relative": TVaccineConfig(**T_VACCINE, layer_sampling="relative_gradient_norm", rho_scale="relative"),
    "vaccine": VaccineConfig(rho=0.5),
    "oasis": OASISConfig(rho=0.5, num_active_layers=2, probe_steps=3, probe_batch_size=3),
    "oasis, renormalised": OASISConfig(
        rho=0.1, rho_scale="relative", renormalise=True, num_active_layers=2, probe_steps=3, probe_batch_size=3
    ),
    "random_noise": RandomNoiseConfig(rho=0.5),
    "rep_noise": RepNoiseConfig(batch_size=2),
    "tar": TARConfig(inner_steps=2, tamper_every=2, adversary_learning_rates=[1e-3, 1e-2], batch_size=2),
    "booster": BoosterConfig(batch_size=2),
    "ctrap": CTRAPConfig(batch_size=2, collapse_token="cannot"),
    "circuit_breaker": CircuitBreakerConfig(batch_size=2),
    "crl": CRLConfig(batch_size=2),
    "seam": SEAMConfig(batch_size=2),
    "lisa": LisaConfig(alignment_steps=2, user_steps=1, warmup_ratio=0.0, batch_size=2),
    "custom": DriftConfig(),
}
DEFENSE = DEFENSES["gradient_norm, layer"]
MOMENTS = {
    "before a step": ("on_step_begin", 5),
    "between micro-batches": ("on_substep_end", 4),
    "before the optimizer": ("on_pre_optimizer_step", 5),
    "after a step": ("on_step_end", 5),
    "after a log": ("on_log", 6),
    "after a save": ("on_save", 4),
    "at the end of an epoch": ("on_epoch_end", 6),
    "after the last save": ("on_save", 7),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return contents(finish(tmp_path_factory.mktemp("whole"), DEFENSE))


def assert_killed_and_resumed_equals(expected, output, defense, **options):
    assert in_child(lambda: finish(output, defense, **options)) == -signal.SIGKILL
    finish(output, defense, resume=True)
    resumed = contents(output)
    assert resumed["safety_trace.jsonl"].decode() == expected["safety_trace.jsonl"].decode()
    assert resumed == expected
    assert not list(output.rglob("*.tmp"))


@pytest.mark.parametrize("name", [name for name in DEFENSES if DEFENSES[name] is not DEFENSE])
def test_every_defense_resumes_exactly(tmp_path, name):
    defense = DEFENSES[name]
    expected = contents(finish(tmp_path / "whole", defense))
    callbacks = [At("on_substep_end", 4, kill)]
    assert_killed_and_resumed_equals(expected, tmp_path / "killed", defense, callbacks=callbacks)


@pytest.mark.parametrize("moment", MOMENTS)
def test_it_may_be_killed_at_any_moment(whole, tmp_path, moment):
    assert_killed_and_resumed_equals(whole, tmp_path, DEFENSE, callbacks=[At(*MOMENTS[moment], kill)])


def test_it_may_be_killed_between_probe_and_draw(whole, tmp_path, monkeypatch):
    draw = TVaccine._draw
    with monkeypatch.context() as patch:
        patch.setattr(TVaccine, "_draw", lambda self, step: kill() if step == 6 else draw(self, step))
        assert in_child(lambda: finish(tmp_path, DEFENSE)) == -signal.SIGKILL
    finish(tmp_path, DEFENSE, resume=True)
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("written", ["save_state", "save_window", "rotate_checkpoints"])
def test_it_may_be_killed_while_a_checkpoint_is_written(whole, tmp_path, monkeypatch, written):
    home = transformers.trainer if written == "rotate_checkpoints" else mixin
    original, calls = getattr(home, written), []

    def killing(*args, **kwargs):
        calls.append(1)
        return kill() if len(calls) == 2 else original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(home, written, killing)
        assert in_child(lambda: finish(tmp_path, DEFENSE)) == -signal.SIGKILL
    is_complete = written == "rotate_checkpoints"
    assert checkpoint.newest_complete(tmp_path).name == ("checkpoint-4" if is_complete else "checkpoint-2")
    assert (tmp_path / "checkpoint-4").is_dir()
    finish(tmp_path, DEFENSE, resume=True)
    assert contents(tmp_path) == whole


def test_a_run_may_be_killed_twice(whole, tmp_path):
    assert in_child(lambda: finish(tmp_path, DEFENSE, callbacks=[At("on_step_end", 3, kill)])) == -signal.SIGKILL
    assert_killed_and_resumed_equals(
        whole, tmp_path, DEFENSE, resume=True, callbacks=[At("on_pre_optimizer_step", 4, kill)]
    )


def test_the_trainer_s_own_log_resumes_too(tmp_path):
    run = build(tmp_path / "whole", DEFENSE)
    run.train()
    again = build(tmp_path / "again", DEFENSE)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert logs(run) == logs(again)
    assert len(logs(run)) == 2
    assert run.state.log_history[-1]["train_loss"] == again.state.log_history[-1]["train_loss"]


def test_epochs_are_logged_alike_when_the_run_is_killed_at_the_end_of_one_and_of_all(tmp_path):
    options = {"logging_strategy": "epoch", "save_steps": 1}
    expected = contents(finish(tmp_path / "whole", DEFENSE, **options))
    lines = [json.loads(line) for line in expected["safety_trace.jsonl"].splitlines()]
    assert [line["step"] for line in lines if line["event"] == "step"] == [3, 6, 7]
    for step in (3, 7):
        output = tmp_path / f"killed-{step}"
        killed = {"callbacks": [At("on_save", step, kill)], **options}
        assert in_child(lambda: finish(output, DEFENSE, **killed)) == -signal.SIGKILL  # noqa: B023 (called at once)
        finish(output, DEFENSE, resume=True, **options)
        assert contents(output) == expected, f"killed after step {step}"


def test_a_checkpoint_of_another_folder_brings_its_trace(whole, tmp_path):
    finish(tmp_path / "one", DEFENSE)
    finish(tmp_path / "two", DEFENSE, resume=str(tmp_path / "one" / "checkpoint-4"))
    assert contents(tmp_path / "two") == whole


def stopped(output, **options):
    """A run that ended after its checkpoint of step 4."""

    def stop():
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        finish(output, DEFENSE, callbacks=[At("on_step_end", 5, stop)], **options)
    return output


@pytest.fixture(scope="module")
def run_of_five(tmp_path_factory):
    return stopped(tmp_path_factory.mktemp("stopped"))


def copy_of(run, output):
    shutil.copytree(run, output)
    return output


def test_a_checkpoint_with_other_settings_is_refused_before_training(run_of_five, tmp_path):
    output = copy_of(run_of_five, tmp_path / "out")
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    other = DEFENSE.model_copy(update={"rho": 0.25, "freeze": "none"})
    run = build(output, other, seed=7)
    run.training_step = pytest.fail
    with pytest.raises(
        ValueError, match="seed: 42 -> 7; settings.freeze: layer -> none; settings.rho: 0.5 -> 0.25. Rest"
    ):
        run.train(resume_from_checkpoint=True)
    assert {path: path.read_bytes() for path in before} == before


def test_a_checkpoint_with_other_data_is_refused(run_of_five, tmp_path):
    output = copy_of(run_of_five, tmp_path / "out")
    with pytest.raises(ValueError, match="data.harmful_datasets.rows: 10 -> 9; data.harmful_datasets.sha256: "):
        finish(output, DEFENSE, resume=True, harmful_dataset=chats(WORLD.hazards[10:19], refuse=False))


def drop(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:40])


@pytest.mark.parametrize(
    ("damage", "name", "message"),
    [
        (drop, "trainer_state.json", "not a complete checkpoint.*Resume from .*checkpoint-2"),
        (cut, "trainer_state.json", "not a complete checkpoint.*Resume from .*checkpoint-2"),
        (drop, "safety_defense_state.0.json", "damaged .FileNotFoundError.*Resume from an earlier checkpoint"),
        (drop, "safety_defense_state.json", "not found, so the defense cannot go on"),
        (cut, "safety_defense_state.json", "state in it is damaged .*Resume from an earlier checkpoint"),
        (cut, "safety_defense_state.0.json", "damaged .*Resume from an earlier checkpoint"),
        (cut, "adapter_model.safetensors", "weights in it are not the ones"),
        (drop, "adapter_model.safetensors", "weights in it are not the ones"),
    ],
)
def test_a_damaged_checkpoint_is_one_sentence(run_of_five, tmp_path, damage, name, message):
    output = copy_of(run_of_five, tmp_path / "out")
    damage(output / "checkpoint-4" / name)
    before = {path: path.read_bytes() for path in output.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match=message):
        finish(output, DEFENSE, resume=str(output / "checkpoint-4"))
    assert {path: path.read_bytes() for path in output.iterdir() if path.is_file()} == before


def test_a_checkpoint_of_another_version_and_one_that_is_not_there_are_refused(run_of_five, tmp_path):
    output = copy_of(run_of_five, tmp_path / "out")
    state = output / "checkpoint-4" / "safety_defense_state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"format": 1}))
    with pytest.raises(ValueError, match="another version of tvac-plugin. Resume with that version"):
        finish(output, DEFENSE, resume=str(output / "checkpoint-4"))
    with pytest.raises(ValueError, match="checkpoint-9: no such checkpoint. Correct"):
        finish(output, DEFENSE, resume=str(output / "checkpoint-9"))
    with pytest.raises(ValueError, match="no complete checkpoint to resume from. Start anew"):
        finish(tmp_path / "empty", DEFENSE, resume=True)


def test_overwriting_a_checkpoint_never_leaves_a_mixture_of_two_runs(run_of_five, tmp_path, monkeypatch):
    output = copy_of(run_of_five, tmp_path / "out")
    monkeypatch.setattr(mixin, "save_state", lambda *_, **__: kill())
    assert in_child(lambda: finish(output, DEFENSE, seed=7)) == -signal.SIGKILL
    assert not checkpoint.is_complete(output / "checkpoint-2")
    assert not (output / "checkpoint-2" / "safety_defense_state.json").exists()


def test_a_checkpoint_of_more_processes_is_refused_before_training(run_of_five, tmp_path):
    output = copy_of(run_of_five, tmp_path / "out")
    state = output / "checkpoint-4" / "safety_defense_state.json"
    written = json.loads(state.read_text())
    assert written["num_processes"] == 1
    state.write_text(json.dumps(written | {"num_processes": 4}))
    with pytest.raises(ValueError, match="4 processes trained it and 1 process would go on.*Launch 4 processes, or"):
        finish(output, DEFENSE, resume=True)


def test_a_state_that_cannot_be_saved_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(TVaccine, "state_dict", lambda _self: {"layers": {1, 2}})
    monkeypatch.setattr(TVaccine, "load_state_dict", lambda _self, _state: None)
    with pytest.raises(ValueError, match="state_dict.. has 'layers', which cannot be saved: .*Return JSON values"):
        finish(tmp_path, DEFENSE)
