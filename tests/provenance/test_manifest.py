"""The manifest proves what it says, and nothing else does."""

from __future__ import annotations

import json

import pytest
import torch

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.configs.perturbation import TVaccineConfig
from tvac_plugin.defenses.base import Position, StepReport
from tvac_plugin.provenance.manifest import described, verify
from tvac_plugin.provenance.model_files import file_hashes
from tvac_plugin.provenance.record import RunRecord
from tvac_plugin.provenance.run_identity import refuse_other_run


def record(output, *, steps=1, norms=(1.0,), trained=1.0, defense=None):
    run = RunRecord(defense or TVaccineConfig(), data={"alignment": {"rows": 1}}, seed=1)
    weights = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(3))]
    run.begin(output, resumed=False, write=True, weights=weights)
    for step in range(steps):
        norm = norms[step % len(norms)]
        report = StepReport(
            loss=torch.tensor(1.0),
            losses={"clean_loss": torch.tensor(0.9)},
            norms={"perturbation_norm": torch.tensor(norm)},
            active_layers=(0, 2),
            num_fired=2,
            events=[{"event": "draw", "layers": [0, 2]}],
        )
        run.add(report, Position(step, True))
    with torch.no_grad():
        weights[0] += trained
    run.look(weights)
    return run


@pytest.fixture
def model_dir(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    return tmp_path


def test_a_sealed_model_verifies(model_dir):
    record(model_dir, steps=3).seal(model_dir)
    manifest = verify(model_dir, defense="t_vaccine")
    assert {key: manifest[key] for key in ("steps", "defended_steps", "hook_fires", "moved_tensors")} == {
        "steps": 3, "defended_steps": 3, "hook_fires": 6, "moved_tensors": 1,
    }  # fmt: skip
    assert not list(model_dir.glob("*.tmp"))


def test_idle_batches_are_said_at_the_end_of_training_and_by_verify(model_dir, caplog):
    done = record(model_dir, steps=20, norms=(0.0, *[1.0] * 19)).seal(model_dir)
    said = "19 of 20 batches defended (it did nothing in 1 (5.0%); at most 10% may be so), in 19 of 20 steps"
    assert f"t_vaccine, {said}" in caplog.text
    assert f"t_vaccine, {said}" in done
    assert described(verify(model_dir)).startswith(f"t_vaccine: {said}")


def test_verify_says_why_a_run_that_ended_is_not_defended(model_dir):
    record(model_dir, steps=4, norms=(0.0, 1.0)).seal(model_dir)
    with pytest.raises(UserError, match="A defended run ended here, but in 2 of 4 batches the defense did nothing"):
        verify(model_dir)


def test_nothing_is_sealed_before_the_first_defended_step(model_dir):
    record(model_dir, steps=0).seal(model_dir)
    with pytest.raises(UserError, match="not found, so nothing shows that this model was defended"):
        verify(model_dir)


def test_a_wrong_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="gone: no such folder. Name the `output_dir`"):
        verify(tmp_path / "gone")


def test_other_weights_do_not_verify(model_dir):
    record(model_dir).seal(model_dir)
    (model_dir / "adapter_model.safetensors").write_bytes(b"undefended")
    with pytest.raises(UserError, match="adapter_model.safetensors changed in this folder: not what was defended"):
        verify(model_dir)


def test_a_folder_without_weights_does_not_verify(tmp_path):
    record(tmp_path).seal(tmp_path)
    with pytest.raises(UserError, match="not of a defended model: files: Dictionary should have at least 1 item"):
        verify(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "[" * 100_000, "\x00"])
def test_a_broken_manifest_is_one_sentence(model_dir, content):
    (model_dir / "safety_defense.json").write_text(content)
    with pytest.raises(UserError, match="not a manifest: damaged, or written by something else"):
        verify(model_dir)


def test_a_new_run_sets_the_proof_of_the_old_one_aside(model_dir):
    record(model_dir, steps=5).seal(model_dir)
    record(model_dir, steps=1)
    with pytest.raises(UserError, match=r"later run started here .* before is safety_defense.previous"):
        verify(model_dir)
    assert len((model_dir / "safety_trace.jsonl").read_text().splitlines()) == 1
    assert len((model_dir / "safety_trace.previous.jsonl").read_text().splitlines()) == 5
    record(model_dir, steps=1)
    (model_dir / "safety_defense.previous.json").rename(model_dir / "safety_defense.json")
    assert verify(model_dir)["defended_steps"] == 5


def test_the_proof_that_was_set_aside_goes_when_the_new_run_is_done(model_dir):
    record(model_dir, steps=5).seal(model_dir)
    record(model_dir, steps=1).seal(model_dir)
    assert verify(model_dir)["defended_steps"] == 1
    assert not list(model_dir.glob("*previous*"))


def test_weights_that_were_trained_by_next_to_nothing_are_not_trained(model_dir, caplog):
    record(model_dir, trained=1e-30).seal(model_dir)
    assert "none of 2 trained tensors differs from what it was before training" in caplog.text
    assert not (model_dir / "safety_defense.json").exists()


@pytest.mark.parametrize(("moved", "is_sealed"), [(9, False), (10, True)])
def test_a_hundredth_of_the_weights_must_have_moved(tmp_path, caplog, moved, is_sealed):
    run = record(tmp_path)
    weights = [torch.nn.Parameter(torch.zeros(1000))]
    run.begin(tmp_path, resumed=False, write=True, weights=weights)
    run.add(StepReport(torch.tensor(1.0), norms={"n": torch.tensor(1.0)}), Position(0, True))
    with torch.no_grad():
        weights[0][:moved] = 1.0
    run.look(weights)
    run.seal(tmp_path)
    assert (tmp_path / "safety_defense.json").exists() == is_sealed
    assert is_sealed or "0.90% of the trained weights differ" in caplog.text


def test_weights_that_were_changed_after_training_are_not_defended(model_dir, caplog):
    run = record(model_dir)
    weights = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.zeros(3))]
    run.look(weights, is_last=True)
    run.look([torch.nn.Parameter(torch.full((2,), 3.0)), weights[1]])
    run.seal(model_dir)
    assert "the weights were changed after the training, without the defense" in caplog.text
    run.look(weights)
    run.seal(model_dir)
    assert verify(model_dir)["moved_tensors"] == 1


@pytest.mark.parametrize("nothing", [0.0, float("nan"), float("inf")])
def test_batches_without_perturbation_are_counted(model_dir, nothing):
    record(model_dir, steps=20, norms=[nothing, nothing, *[1.0] * 18]).seal(model_dir)
    manifest = verify(model_dir)
    assert (manifest["idle_batches"], manifest["measured_batches"], manifest["defended_steps"]) == (2, 20, 18)


def test_a_run_that_was_idle_too_often_does_not_claim_to_be_defended(model_dir, caplog):
    record(model_dir, steps=20, norms=[0.0, 0.0, 0.0, *[1.0] * 17]).seal(model_dir)
    assert "in 3 of 20 batches the defense did nothing" in caplog.text
    assert not (model_dir / "safety_defense.json").exists()


@pytest.mark.parametrize("nothing", [0.0, float("nan")])
def test_a_run_that_did_nothing_in_any_batch_does_not_claim_to_be_defended(model_dir, nothing, caplog):
    record(model_dir, steps=3, norms=[nothing]).seal(model_dir)
    assert "in 3 of 3 batches the defense did nothing" in caplog.text
    with pytest.raises(UserError, match="in 3 of 3 batches the defense did nothing"):
        verify(model_dir)


def test_the_trace_is_cut_back_to_the_checkpoint(model_dir):
    run = record(model_dir, steps=3)
    run.trace_step(3, {"safety/clean_loss": float("nan")})
    state = json.loads(json.dumps(run.state_dict()))
    written = (model_dir / "safety_trace.jsonl").read_text()
    run.trace_step(4, {})
    with (model_dir / "safety_trace.jsonl").open("a") as file:
        file.write('{"step": 9, "ev')
    run.load_state_dict(state, trace_from=model_dir)
    assert (model_dir / "safety_trace.jsonl").read_text() == written
    assert json.loads(written.splitlines()[-1], parse_constant=pytest.fail)["safety/clean_loss"] is None


def test_a_trace_of_another_run_is_not_continued(model_dir, caplog):
    state = record(model_dir, steps=3).state_dict()
    run = record(model_dir, steps=3, norms=(2.0,))
    (model_dir / "safety_trace.jsonl").write_text('{"step": 0, "event": "draw", "layers": [1, 3]}\n')
    run.load_state_dict(state, trace_from=model_dir)
    assert (model_dir / "safety_trace.jsonl").read_text() == ""
    assert "not the trace that led to the checkpoint" in caplog.text


def test_versions_that_changed_on_the_way_are_named(model_dir):
    run = record(model_dir)
    state = run.state_dict()
    state["versions"] = [{"torch": "0.1"}]
    run.load_state_dict(state, trace_from=model_dir)
    run.seal(model_dir)
    assert verify(model_dir)["earlier_versions"] == [{"torch": "0.1"}]


def facts(**changes):
    return {"defense": "t_vaccine", "settings": {"rho": 3.0, "freeze": "layer"}, "seed": 1, **changes}


@pytest.mark.parametrize(
    ("now", "differences"),
    [
        (facts(settings={"rho": 1.0, "freeze": "layer"}), "settings.rho: 3.0 -> 1.0"),
        (facts(settings={"rho": 3.0, "freeze": "none"}, seed=2), "seed: 1 -> 2; settings.freeze: layer -> none"),
        (facts(settings={"rho": 3.0}), "settings.freeze: layer -> absent"),
        (facts(defense="vaccine", settings={"rho": 2.0}), "safety_defense: t_vaccine -> vaccine"),
    ],
)
def test_another_run_is_refused_with_what_differs(tmp_path, now, differences):
    with pytest.raises(ValueError, match=f"is neither: {differences}. Restore these, or start anew"):
        refuse_other_run(facts(data={}), now, checkpoint=tmp_path)


def test_the_same_run_is_not_refused(tmp_path):
    refuse_other_run(facts(data={"datasets": {"rows": 1}}), facts(), checkpoint=tmp_path)


def test_processes_that_do_not_write_leave_nothing(tmp_path):
    run = RunRecord(TVaccineConfig(), data={}, seed=1)
    run.begin(tmp_path / "out", resumed=False, write=False)
    run.seal(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_adapter_s_settings_are_the_same_in_any_order_of_their_modules(model_dir):
    settings = {"lora_alpha": 16, "target_modules": ["q_proj", "o_proj"]}
    (model_dir / "adapter_config.json").write_text(json.dumps(settings))
    before = file_hashes(model_dir)
    (model_dir / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": ["o_proj", "q_proj"]}))
    assert file_hashes(model_dir) == before
    for other in (settings | {"lora_alpha": 0}, settings | {"target_modules": ["q_proj"]}, ["q_proj"]):
        (model_dir / "adapter_config.json").write_text(json.dumps(other))
        assert file_hashes(model_dir) != before
