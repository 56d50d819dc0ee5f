"""What can go wrong on the way leaves the model, the folder and its claims as they should be."""

from __future__ import annotations

import errno
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.support.sft_runs import WORLD, At, build, chats, finish, in_child
from tvac_plugin.boundary.errors import UserError
from tvac_plugin.boundary.files import LOCK_FILE
from tvac_plugin.configs.collapse import CTRAPConfig, SEAMConfig
from tvac_plugin.configs.perturbation import OASISConfig, TVaccineConfig, VaccineConfig
from tvac_plugin.configs.representations import CircuitBreakerConfig, CRLConfig
from tvac_plugin.configs.unlearning import BoosterConfig, RepNoiseConfig, TARConfig
from tvac_plugin.defenses import two_pass
from tvac_plugin.model.weights import restored
from tvac_plugin.provenance.manifest import verify
from tvac_plugin.trainers import checkpoint
from tvac_plugin.trainers.host import TrainerHost
from tvac_plugin.trainers.interrupts import held_interrupts

DEFENSE = TVaccineConfig(rho=0.5, num_active_layers=2, probe_batch_size=3)
SHORT = {"max_steps": 2, "gradient_accumulation_steps": 1, "logging_steps": 1, "save_strategy": "no"}


def marks(run):
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in run.model.modules()]
    return hooks, [p.requires_grad for p in run.model.parameters()]


def assert_fails_cleanly(run, error, match=None):
    """Trains until `error`; nothing is left that should not be."""
    before, handlers = marks(run), [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(error, match=match):
        run.train()
    assert marks(run) == before
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    output = Path(run.args.output_dir)
    assert not list(output.rglob("*.tmp"))
    assert not (output / "safety_defense.json").exists()


def poisoned(monkeypatch, value, *, batches=None):
    """Makes the first pass find gradients of `value` everywhere, in some of the batches."""
    original, calls = two_pass.worst_perturbation, []

    def worst(gradients, **options):
        calls.append(1)
        is_bad = batches is None or len(calls) in batches
        bad = {key: torch.full_like(g, value) for key, g in gradients.items()}
        return original(bad if is_bad else gradients, **options)

    monkeypatch.setattr(two_pass, "worst_perturbation", worst)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_a_gradient_that_says_nothing_is_counted_traced_and_warned_of_once(tmp_path, monkeypatch, caplog, value):
    poisoned(monkeypatch, value, batches={2, 3})
    run = build(tmp_path, DEFENSE, **SHORT | {"max_steps": 4})
    run.train()
    run.save_model()
    assert "in 2 of 4 batches the defense did nothing" in caplog.text
    assert not (tmp_path / "safety_defense.json").exists()
    assert [log.get("safety/idle_batches") for log in run.state.log_history[:4]] == [None, 1, 1, None]
    assert (tmp_path / "safety_trace.jsonl").read_text().count("safety/idle_batches") == 2
    assert caplog.text.count("did nothing in 1 batches") == 1
    assert "lower the learning rate" in caplog.text
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())


def test_a_run_whose_every_gradient_said_nothing_does_not_claim_to_be_defended(tmp_path, monkeypatch):
    poisoned(monkeypatch, float("nan"))
    finish(tmp_path, DEFENSE, **SHORT)
    with pytest.raises(UserError, match="the defense did nothing"):
        verify(tmp_path)


@pytest.mark.parametrize(
    "defense",
    [
        BoosterConfig(batch_size=2),
        CTRAPConfig(batch_size=2),
        CircuitBreakerConfig(batch_size=2),
        CRLConfig(batch_size=2),
        SEAMConfig(batch_size=2),
        RepNoiseConfig(batch_size=2),
        TARConfig(inner_steps=1, tamper_every=1, adversary_learning_rates=[1e-3], batch_size=2, retain_scale=0.0),
    ],
    ids=lambda defense: defense.block,
)
def test_a_gradient_that_is_not_finite_is_never_added(tmp_path, monkeypatch, defense):
    def gradients(_self, loss, parameters):
        return [torch.full_like(parameter, float("nan")) for parameter in parameters]

    monkeypatch.setattr(TrainerHost, "gradients", gradients)
    run = build(tmp_path, defense, **SHORT)
    run.train()
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())
    run.save_model()
    with pytest.raises(UserError):
        verify(tmp_path)


def test_a_batch_of_padding_trains_nothing_and_perturbs_nothing(tmp_path, caplog):
    run = build(tmp_path, DEFENSE, **SHORT)
    collate = run.data_collator
    calls = []

    def padded(rows):
        batch = collate(rows)
        calls.append(1)
        if len(calls) == 1:
            batch["labels"] = torch.full_like(batch["labels"], -100)
        return batch

    run.data_collator = padded
    run.train()
    run.save_model()
    assert not (tmp_path / "safety_defense.json").exists(), "the defense did nothing in too many batches"
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())


def test_an_empty_answer_trains_like_any_other(tmp_path):
    rows = chats(WORLD.hazards[:10], refuse=True)
    nothing = {"completion": [{"role": "assistant", "content": ""}]}
    empty = rows.map(lambda row, number: nothing if number < 9 else row, with_indices=True)
    finish(tmp_path, DEFENSE, train_dataset=empty, **SHORT)
    assert verify(tmp_path)["defended_steps"] == 2


def test_fewer_harmful_rows_than_a_probe_batch_are_enough(tmp_path):
    harmful = chats(WORLD.hazards[10:12], refuse=False)
    finish(tmp_path, TVaccineConfig(num_active_layers=2, probe_batch_size=8), harmful_dataset=harmful, **SHORT)
    assert verify(tmp_path)["data"]["harmful_datasets"]["rows"] == 2


@pytest.mark.parametrize(
    ("defense", "last_pass"),
    [
        (DEFENSE, 5),
        (VaccineConfig(), 4),
        (OASISConfig(num_active_layers=2, probe_batch_size=3), 5),
        (BoosterConfig(batch_size=2), 6),
        (CTRAPConfig(batch_size=2), 6),
    ],
    ids=["t_vaccine", "vaccine", "oasis", "booster", "ctrap"],
)
def test_out_of_memory_in_the_training_pass_leaves_the_model_as_it_was(tmp_path, defense, last_pass):
    run = build(tmp_path, defense, **SHORT)
    head = run.model.base_model.model.lm_head
    passes = []

    def fail(*_):
        passes.append(1)
        if len(passes) == last_pass:
            raise torch.OutOfMemoryError("pass 2")

    handle = head.register_forward_hook(fail)
    assert_fails_cleanly(run, torch.OutOfMemoryError)
    handle.remove()
    run.train()
    run.save_model()
    assert verify(tmp_path)["defended_steps"] == 2


def test_starting_again_with_smaller_batches_counts_from_zero(tmp_path):
    run = build(tmp_path, DEFENSE, auto_find_batch_size=True, **SHORT)
    step, steps = run.host_step, []

    def fail_once(*args):
        steps.append(1)
        if len(steps) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(*args)

    run.host_step = fail_once
    run.train()
    run.save_model()
    assert verify(tmp_path)["defended_steps"] == 2
    assert (tmp_path / "safety_trace.jsonl").read_text().count('"event": "probe"') == 1


@pytest.mark.parametrize("event", ["on_step_begin", "on_pre_optimizer_step", "on_step_end", "on_log"])
def test_an_exception_in_a_user_s_callback_leaves_the_model_as_it_was(tmp_path, event):
    def fail():
        raise ZeroDivisionError("mine")

    run = build(tmp_path, DEFENSE, callbacks=[At(event, 1, fail)], **SHORT)
    assert_fails_cleanly(run, ZeroDivisionError, "mine")


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_is_full_at_a_checkpoint_leaves_no_half_of_it(tmp_path, monkeypatch):
    run = build(tmp_path, DEFENSE, **SHORT | {"save_strategy": "steps", "save_steps": 1})
    save, saves = checkpoint.write_json, []

    def full_at_second(path, value):
        saves.append(path.parent.name)
        return no_space() if "checkpoint-2" in saves else save(path, value)

    monkeypatch.setattr(checkpoint, "write_json", full_at_second)
    assert_fails_cleanly(run, OSError, "No space left")
    assert not (tmp_path / "checkpoint-2").exists()
    assert verify(tmp_path / "checkpoint-1")["defended_steps"] == 1
    monkeypatch.undo()
    finish(tmp_path, DEFENSE, resume=True, **SHORT | {"save_strategy": "steps", "save_steps": 1})
    assert verify(tmp_path)["defended_steps"] == 2


@pytest.mark.parametrize("failing", ["tvac_plugin.provenance.manifest.write_json", "pathlib.Path.replace"])
def test_a_disk_that_is_full_at_the_manifest_leaves_no_claim(tmp_path, monkeypatch, failing):
    run = build(tmp_path, DEFENSE, **SHORT)
    run.train()
    with monkeypatch.context() as patch:
        patch.setattr(failing, no_space)
        with pytest.raises((OSError, UserError), match="No space left"):
            run.save_model()
    assert not list(tmp_path.rglob("*.tmp"))
    with pytest.raises(UserError):
        verify(tmp_path)
    run.save_model()
    verify(tmp_path)


def test_a_file_size_limit_in_the_middle_of_a_checkpoint_is_survived(tmp_path):
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        finish(tmp_path, DEFENSE, **SHORT | {"save_strategy": "steps", "save_steps": 1})

    assert in_child(limited) == 1
    assert not list(tmp_path.glob("checkpoint-*"))
    assert not (tmp_path / "safety_defense.json").exists()


def test_a_failed_run_keeps_the_earlier_model_and_its_proof_but_not_its_claim(tmp_path):
    finish(tmp_path, DEFENSE, **SHORT)
    model, proof = ((tmp_path / n).read_bytes() for n in ("adapter_model.safetensors", "safety_defense.json"))

    def fail():
        raise ZeroDivisionError

    run = build(tmp_path, DEFENSE, seed=3, callbacks=[At("on_step_end", 1, fail)], **SHORT)
    assert_fails_cleanly(run, ZeroDivisionError)
    with pytest.raises(UserError, match="later run started here"):
        verify(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == model
    assert (tmp_path / "safety_defense.previous.json").read_bytes() == proof


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_weights_to_be_put_back(number):
    weight = torch.nn.Parameter(torch.ones(2))
    seen = []
    before = signal.signal(number, lambda *_: seen.append(weight.detach().clone()))
    try:
        with held_interrupts(), restored([weight]):
            weight.data.zero_()
            os.kill(os.getpid(), number)
            assert not seen
        assert torch.equal(seen[0], torch.ones(2))
        with held_interrupts():
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            assert len(seen) == 2
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_point_ends_cleanly(tmp_path, monkeypatch, number):
    def leave(*_):
        raise SystemExit(0)

    before = signal.signal(number, leave)
    monkeypatch.setattr(two_pass, "refuse_unperturbed", lambda *_: os.kill(os.getpid(), number))
    try:
        assert_fails_cleanly(build(tmp_path, DEFENSE, **SHORT), SystemExit)
    finally:
        signal.signal(number, before)


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_is_killed(tmp_path):
    child = os.fork()
    if child == 0:
        finish(tmp_path, DEFENSE, callbacks=[At("on_step_end", 1, lambda: time.sleep(300))], **SHORT)
        os._exit(1)
    try:
        trace = tmp_path / "safety_trace.jsonl"
        while not (trace.exists() and "draw" in trace.read_text()):
            time.sleep(0.05)
        written = trace.read_text()
        run = build(tmp_path, DEFENSE, **SHORT)
        with pytest.raises(UserError, match=rf"another run is writing here \(process {child}\). Wait for it"):
            run.train()
        assert trace.read_text().startswith(written)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    run.train()
    run.save_model()
    assert verify(tmp_path)["defended_steps"] == 2


def test_the_lock_is_released_at_the_end_and_after_an_error(tmp_path):
    run = build(tmp_path, DEFENSE, callbacks=[At("on_step_end", 1, lambda: 1 / 0)], **SHORT)
    with pytest.raises(ZeroDivisionError):
        run.train()
    assert (tmp_path / LOCK_FILE).exists()
    assert in_child(lambda: finish(tmp_path, DEFENSE, **SHORT)) == 0
    assert in_child(lambda: finish(tmp_path, DEFENSE, **SHORT)) == 0


def test_an_output_folder_that_cannot_be_written_to_is_refused_before_training(tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("a file")
    run = build(tmp_path / "out", DEFENSE, **SHORT)
    run.args.output_dir = str(tmp_path / "taken")
    run.training_step = pytest.fail
    with pytest.raises(UserError, match="taken: nothing can be written here .*set another `output_dir:`"):
        run.train()

    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    run.args.output_dir = str(tmp_path / "out")
    monkeypatch.setattr("pathlib.Path.mkdir", read_only)
    with pytest.raises(UserError, match="out: nothing can be written here .Read-only file system"):
        run.train()
