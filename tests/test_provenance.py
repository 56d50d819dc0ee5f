"""The manifest proves what it says, and nothing else does."""

from __future__ import annotations

import json

import pytest
import torch

from tvac_plugin.args import TVaccineConfig
from tvac_plugin.defenses.base import Position, StepReport
from tvac_plugin.provenance import ProvenanceError, RunRecord, verify


def record(output, *, steps=1, norm=1.0):
    run = RunRecord(TVaccineConfig(), data={"alignment": {"rows": 1}}, seed=1)
    run.begin(output, resumed=False, write=True)
    for step in range(steps):
        report = StepReport(
            loss=torch.tensor(1.0),
            losses={"clean_loss": torch.tensor(0.9)},
            norms={"perturbation_norm": torch.tensor(norm)},
            active_layers=(0, 2),
            num_fired=2,
            events=[{"event": "draw", "layers": [0, 2]}],
        )
        run.add(report, Position(step, True))
    return run


@pytest.fixture
def model_dir(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    return tmp_path


def test_a_sealed_model_verifies(model_dir):
    record(model_dir, steps=3).seal(model_dir)
    manifest = verify(model_dir, defense="t_vaccine")
    assert (manifest["defended_steps"], manifest["hook_fires"]) == (3, 6)
    assert not list(model_dir.glob("*.tmp"))


def test_nothing_is_sealed_before_the_first_defended_step(model_dir):
    record(model_dir, steps=0).seal(model_dir)
    with pytest.raises(ProvenanceError, match="not found, so nothing shows that this model was defended"):
        verify(model_dir)


def test_a_wrong_folder_is_named(tmp_path):
    with pytest.raises(ProvenanceError, match="gone: no such folder. Name the `output_dir`"):
        verify(tmp_path / "gone")


def test_other_weights_do_not_verify(model_dir):
    record(model_dir).seal(model_dir)
    (model_dir / "adapter_model.safetensors").write_bytes(b"undefended")
    with pytest.raises(ProvenanceError, match="weights in this folder are not the ones that were defended"):
        verify(model_dir)


def test_a_folder_without_weights_does_not_verify(tmp_path):
    record(tmp_path).seal(tmp_path)
    with pytest.raises(ProvenanceError, match="not the ones"):
        verify(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null"])
def test_a_broken_manifest_is_one_sentence(model_dir, content):
    (model_dir / "safety_defense.json").write_text(content)
    with pytest.raises(ProvenanceError, match="not a manifest"):
        verify(model_dir)


def test_a_new_run_removes_the_old_manifest_and_trace(model_dir):
    record(model_dir, steps=5).seal(model_dir)
    record(model_dir, steps=1)
    assert not (model_dir / "safety_defense.json").exists()
    assert len((model_dir / "safety_trace.jsonl").read_text().splitlines()) == 1


def test_batches_without_perturbation_are_counted(model_dir):
    record(model_dir, steps=2, norm=0.0).seal(model_dir)
    assert verify(model_dir)["idle_batches"] == 2


def test_the_trace_is_cut_back_to_the_checkpoint(model_dir):
    run = record(model_dir, steps=4)
    state = run.state_dict()
    run.trace_step(3, {})
    run.trace_step(4, {})
    with (model_dir / "safety_trace.jsonl").open("a") as file:
        file.write('{"step": 9, "ev')
    run.load_state_dict(state, step=3)
    lines = [json.loads(line) for line in (model_dir / "safety_trace.jsonl").read_text().splitlines()]
    assert [(line["step"], line["event"]) for line in lines] == [(0, "draw"), (1, "draw"), (2, "draw"), (3, "step")]


def test_processes_that_do_not_write_leave_nothing(tmp_path):
    run = RunRecord(TVaccineConfig(), data={}, seed=1)
    run.begin(tmp_path / "out", resumed=False, write=False)
    run.seal(tmp_path)
    assert not list(tmp_path.iterdir())
