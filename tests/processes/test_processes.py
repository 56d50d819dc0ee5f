"""Data-parallel training over gloo on the CPU: a launch of two processes against one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from accelerate import Accelerator, DistributedType
from safetensors.torch import load_file
from trl import SFTConfig

from tests.processes.runs import CHECKPOINT, NUM_PROCESSES, NUM_STEPS, defenses, distance, trainer, weights
from tests.support.workspace import adapter, axolotl_train, trace
from tests.test_plugin_defenses import attack
from tvac_plugin.defenses.rep_noise import RepNoise
from tvac_plugin.defenses.seam import SEAM
from tvac_plugin.model.types import Pair
from tvac_plugin.provenance.manifest import verify
from tvac_plugin.provenance.model_files import weight_hashes
from tvac_plugin.trainers.checkpoint import is_complete
from tvac_plugin.trainers.host import TrainerHost

ROOT = Path(__file__).parent.parent.parent
LEAN = "t_vaccine"
ALL = list(defenses(NUM_PROCESSES))
WITHIN = [f"{name}:window" for name in (LEAN, "lisa")]


class Launch(NamedTuple):
    """What a launch left behind."""

    status: int
    log: str
    output: Path = Path()


def launch(worker: str, *arguments: object) -> Launch:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_PROCESSES}"]
    done = subprocess.run(
        [*command, "-m", worker, *map(str, arguments)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    return Launch(done.returncode, done.stderr[-40_000:])


@pytest.fixture(scope="module")
def lean(tmp_path_factory):
    output = tmp_path_factory.mktemp("lean")
    return launch("tests.processes.worker", output, LEAN, "fail")._replace(output=output)


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    output = tmp_path_factory.mktemp("every")
    return launch("tests.processes.worker", output, *ALL, *WITHIN)._replace(output=output)


def one_process(output, name, **changes):
    run = trainer(output, name, num_processes=1, **changes)
    before = weights(run.model)
    run.train()
    return before, weights(run.model)


def assert_ranks_agree(output):
    for stage in ("whole", "resumed"):
        ranks = [load_file(output / f"{stage}-{rank}.safetensors") for rank in range(NUM_PROCESSES)]
        assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0]), stage


def final(output):
    return load_file(output / "whole-0.safetensors")


def assert_same_training(together, before, alone):
    moved = distance(before, alone)
    assert moved > 0.02
    assert distance(together, alone) < 1e-4 * moved


def assert_resumed_exactly(output, *, num_steps=NUM_STEPS):
    whole, resumed = (load_file(output / f"{stage}-0.safetensors") for stage in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert (output / "whole.jsonl").read_text() == (output / "resumed.jsonl").read_text()
    for rank in range(NUM_PROCESSES):
        whole, resumed = (json.loads((output / f"{s}-{rank}.logs.json").read_text()) for s in ("whole", "resumed"))
        assert whole == resumed
        assert any(name.startswith("safety/") for log in whole for name in log)  # not in all: Lisa's warm-up has none
    manifests = [verify(output / stage) for stage in ("whole", "resumed")]
    assert manifests[0]["defended_steps"] == manifests[1]["defended_steps"] > 0
    assert manifests[0]["steps"] == manifests[1]["steps"] == num_steps


def test_two_processes_train_as_one_that_accumulates(lean, tmp_path):
    output = lean.output / LEAN
    assert output.is_dir(), lean.log
    assert_ranks_agree(output)
    assert_same_training(final(output), *one_process(tmp_path, LEAN))
    for two, one in zip(trace(output), trace(tmp_path), strict=True):
        assert two.keys() == one.keys()
        for name in two.keys() - {"scores"}:  # scores are those of one process up to a factor
            assert two[name] == (one[name] if name in ("event", "layers") else pytest.approx(one[name], rel=1e-3)), name


def test_two_processes_resume_exactly(lean):
    assert_resumed_exactly(lean.output / LEAN)


def test_one_process_does_not_go_on_where_two_stopped(lean, tmp_path):
    run = trainer(tmp_path, LEAN, num_processes=1)
    checkpoint = lean.output / LEAN / f"checkpoint-{CHECKPOINT}"
    with pytest.raises(ValueError, match="2 processes trained it and 1 process would go on.*Launch 2 processes, or"):
        run.train(resume_from_checkpoint=str(checkpoint))
    assert not (tmp_path / "safety_trace.jsonl").exists()


def test_an_error_in_one_process_ends_the_launch(lean):
    assert lean.status != 0
    assert "RuntimeError: one process cannot go on" in lean.log
    assert not (lean.output / "fail" / "safety_defense.json").exists()
    assert not is_complete(lean.output / "fail" / f"checkpoint-{CHECKPOINT}"), "it lacks a part of one process"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALL if name not in (LEAN, "rep_noise", "seam")])
def test_every_defense_trains_as_one_process_that_accumulates(every, tmp_path, name):
    assert every.status == 0, every.log
    assert_ranks_agree(every.output / name)
    assert_same_training(final(every.output / name), *one_process(tmp_path, name))


@pytest.mark.slow
def test_rep_noise_takes_the_mean_over_processes_of_a_loss_that_is_no_sum_over_rows(every, tmp_path, monkeypatch):
    # MMD and log(1 + A) of a whole batch are not the mean over its parts
    output = every.output / "rep_noise"
    assert_ranks_agree(output)
    loss_of = RepNoise._loss

    def mean_over_parts(self, host, pair, step):
        parts = [
            loss_of(self, host, Pair(*(halves(side)[part] for side in pair)), NUM_PROCESSES * step + part)
            for part in range(NUM_PROCESSES)
        ]
        mean = {key: torch.stack([losses[key] for _, losses in parts]).mean() for key in parts[0][1]}
        return torch.stack([loss for loss, _ in parts]).mean(), mean

    monkeypatch.setattr(RepNoise, "_loss", mean_over_parts)
    assert_same_training(final(output), *one_process(tmp_path, "rep_noise"))


@pytest.mark.slow
def test_seam_takes_the_mean_over_processes_of_losses_that_are_no_sums_over_rows(every, tmp_path, monkeypatch):
    # log(1 + A) and means over the tokens that differ, of a whole batch, are not the mean over its parts
    output = every.output / "seam"
    assert_ranks_agree(output)
    unlearning, attack = SEAM._unlearning_loss, SEAM._attack_loss

    def parts_of(pair):
        return [Pair(*(halves(side)[part] for side in pair)) for part in range(NUM_PROCESSES)]

    def mean_unlearning(self, host, pair):
        found = [unlearning(self, host, part) for part in parts_of(pair)]
        losses = {name: torch.stack([losses[name] for _, losses in found]).mean() for name in found[0][1]}
        return torch.stack([loss for loss, _ in found]).mean(), losses

    def mean_attack(self, host, pair):
        return torch.stack([attack(self, host, part) for part in parts_of(pair)]).mean()

    monkeypatch.setattr(SEAM, "_unlearning_loss", mean_unlearning)
    monkeypatch.setattr(SEAM, "_attack_loss", mean_attack)
    assert_same_training(final(output), *one_process(tmp_path, "seam"))


def halves(batch):
    return [{name: rows.chunk(NUM_PROCESSES)[part] for name, rows in batch.items()} for part in range(NUM_PROCESSES)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALL if name != LEAN])
def test_every_defense_resumes_exactly_in_two_processes(every, name):
    assert_resumed_exactly(every.output / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITHIN)
def test_two_processes_resume_exactly_between_two_logs_and_within_an_epoch(every, name):
    output = every.output / name
    assert output.is_dir(), every.log
    assert_ranks_agree(output)
    assert_resumed_exactly(output, num_steps=6)
    assert [line["step"] for line in trace(output) if line["event"] == "step"] == [3, 6]
    state = json.loads((output / f"checkpoint-{CHECKPOINT}" / "trainer_state.json").read_text())
    assert (state["epoch"], state["log_history"]) == (0.5, [])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "equal"), [("t_vaccine", False), ("t_vaccine_none", True)])
def test_larger_batches_in_one_process_are_the_same_only_where_rho_bounds_a_sample(every, tmp_path, name, equal):
    # with `rho_scope: batch` one norm is taken over a micro-batch, which is larger in one process
    before, alone = one_process(tmp_path, name, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    away = distance(final(every.output / name), alone) / distance(before, alone)
    assert away < 1e-4 if equal else away > 1e-3


@pytest.mark.slow
def test_noise_differs_between_processes(every, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainerHost, "number", lambda self, index: index // NUM_PROCESSES)
    before, same_noise = one_process(tmp_path, "random_noise")
    two = final(every.output / "random_noise")
    assert distance(two, same_noise) > 1e-3 * distance(before, same_noise)


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM])
def test_launches_that_cannot_be_defended_are_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(Accelerator, "distributed_type", kind)
    with pytest.raises(ValueError, match=f"{kind.value} was asked for.*without it, which is DDP"):
        trainer(tmp_path, LEAN, num_processes=1)


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(SFTConfig, "n_gpu", 2)
    with pytest.raises(ValueError, match="DataParallel.*Launch one process per GPU"):
        trainer(tmp_path, LEAN, num_processes=1)


def launched_by_axolotl(recipe, tmp_path):
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe))
    done = launch("tests.processes.axolotl_worker", path)
    assert done.status == 0, done.log
    return Path(recipe["output_dir"])


def writers(tmp_path):
    """Which processes wrote which proofs, in order."""
    return list(dict.fromkeys((tmp_path / "writers.txt").read_text().splitlines()))


@pytest.mark.slow
def test_axolotl_s_trainer_trains_in_two_processes_as_in_one_that_accumulates(workspace, tmp_path):
    changes = {"lora_dropout": 0.0, "optimizer": "sgd", "learning_rate": 0.3}
    recipe = workspace.recipe(tmp_path / "two", gradient_accumulation_steps=2, **changes)
    recipe["t_vaccine"] |= {"probe_batch_size": 2}
    two = launched_by_axolotl(recipe, tmp_path)
    one = axolotl_train(workspace.recipe(tmp_path / "one", gradient_accumulation_steps=4, **changes))
    untrained = {"learning_rate": 0.0, "safety_defense": "none"}
    start = axolotl_train(workspace.recipe(tmp_path / "start", **changes | untrained))
    assert_same_training(adapter(two), adapter(start), adapter(one))
    assert verify(two, defense="t_vaccine")["defended_steps"] == 4
    assert [line["event"] for line in trace(two)] == [line["event"] for line in trace(one)]
    assert writers(tmp_path) == ["0 safety_defense.json"]


@pytest.mark.slow
def test_lisa_defends_a_simulated_user_s_fine_tuning_in_two_processes(workspace, tmp_path):
    output = launched_by_axolotl(attack(workspace, tmp_path / "out", max_steps=6), tmp_path)
    assert verify(output, defense="lisa")["defended_steps"] == 4
    states = [(line["step"], line["state"]) for line in trace(output) if line["event"] == "state"]
    assert states == [(0, "alignment"), (1, "user"), (3, "alignment"), (4, "user")]
    user = json.loads((output / "simulated_user.json").read_text())
    assert user["data"]["harmful_datasets"]["rows"] == 3
    assert user["weights"] == weight_hashes(output)
    assert writers(tmp_path) == ["0 simulated_user.json", "0 safety_defense.json"]
