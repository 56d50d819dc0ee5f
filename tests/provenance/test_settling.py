"""Whether losses had settled when a training ended."""

from __future__ import annotations

import json
import logging
import math
import random

import pytest

from tests.provenance.test_manifest import record
from tvac_plugin.provenance.manifest import described, not_known, verify
from tvac_plugin.provenance.settling import settling


def log_of(losses, **others):
    rows = zip(losses, *others.values(), strict=True)
    return [
        {"step": n, "loss": loss} | {f"safety/{name}": value for name, value in zip(others, more, strict=True)}
        for n, (loss, *more) in enumerate(rows, start=1)
    ]


def exponential(*, half_lives, count=100, floor=1.0, noise=0.0):
    generator = random.Random(0)
    return [
        floor + 2 * 0.5 ** (half_lives * n / count) + (generator.gauss(0, noise) if noise else 0) for n in range(count)
    ]


@pytest.mark.parametrize(("half_lives", "settled"), [(0.5, False), (1, False), (2, False), (5, True), (10, True)])
@pytest.mark.parametrize("floor", [0.0, 1.0, 50.0])
def test_an_exponential_fall_has_settled_when_most_of_its_way_is_covered(half_lives, settled, floor):
    assert settling(log_of(exponential(half_lives=half_lives, floor=floor))).settled is settled


def test_the_means_of_the_last_two_tenths_are_compared():
    losses = [4.0] * 16 + [2.0, 3.0, 1.0, 2.0]
    end = settling(log_of(losses)).ends["loss"]
    assert (end.first, end.before, end.last) == (4.0, 2.5, 1.5)
    assert end.error == pytest.approx(math.sqrt((0.5 + 0.5) / 2))


def test_noise_alone_is_no_change():
    assert settling(log_of(exponential(half_lives=10, noise=0.3))).settled is True
    assert settling(log_of(exponential(half_lives=1, noise=0.03))).settled is False


def test_a_loss_that_rises_at_the_end_has_not_settled():
    losses = exponential(half_lives=10)
    assert settling(log_of([*losses[:90], *(loss + 1 for loss in losses[90:])])).settled is False


def test_of_few_logged_losses_nothing_is_said():
    found = settling(log_of(exponential(half_lives=1, count=19)))
    assert found.facts() == {"settled": None, "unsettled": [], "end_losses": {}}
    assert settling([]).settled is None


def test_a_perturbation_that_takes_back_most_of_what_was_gained_is_not_withstood():
    clean = exponential(half_lives=10)
    near, far = ([loss + gap for loss in clean] for gap in (0.5, 1.5))
    assert settling(log_of(near, clean_loss=clean, perturbed_loss=near)).settled is True
    found = settling(log_of(far, clean_loss=clean, perturbed_loss=far))
    assert found.problems == ["the perturbation takes clean_loss from 1 to 2.5 (3 at first)"]


def test_a_clean_loss_that_still_falls_under_a_settled_perturbed_one_is_told():
    clean, perturbed = exponential(half_lives=1), exponential(half_lives=10)
    (problem,) = settling(log_of(perturbed, clean_loss=clean, perturbed_loss=perturbed)).problems
    assert problem.startswith("clean_loss went from 2.11 to 2.04 between the last two tenths of the log (3 at first)")


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_a_loss_that_is_not_finite_has_not_settled_and_stays_json(value):
    found = settling(log_of([2.0] * 39 + [value]))
    assert found.settled is False
    assert json.loads(json.dumps(found.facts(), allow_nan=False))["end_losses"]["loss"]["last"] is None


@pytest.mark.parametrize(("half_lives", "settled"), [(1, False), (10, True)])
def test_the_manifest_and_a_warning_say_it(tmp_path, caplog, half_lives, settled):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    run = record(tmp_path)
    with caplog.at_level(logging.WARNING):
        run.look_at_log(log_of(exponential(half_lives=half_lives)), is_last=True)
    run.seal(tmp_path)
    manifest = verify(tmp_path)
    assert manifest["settled"] is settled
    assert manifest["end_losses"]["loss"]["first"] == 3.0
    assert ("training ended before its losses had settled: loss went from" in caplog.text) is not settled
    assert ("Train for more steps" in caplog.text) is not settled
    assert ("Its losses had not settled: loss went from" in described(manifest)) is not settled
    assert not any("settled" in note for note in not_known(manifest))


def test_a_run_too_short_to_tell_says_so(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    run = record(tmp_path)
    run.look_at_log(log_of([3.0] * 19), is_last=True)
    run.seal(tmp_path)
    (note,) = [note for note in not_known(verify(tmp_path)) if "settled" in note]
    assert note.startswith("Fewer than 20 losses were logged")


def test_a_checkpoint_in_the_middle_of_a_run_warns_of_nothing(tmp_path, caplog):
    run = record(tmp_path)
    run.look_at_log(log_of(exponential(half_lives=1)))
    assert "settled" not in caplog.text
