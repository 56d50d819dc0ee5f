"""Lisa against arXiv 2405.18641, Algorithm 1, written out."""

from __future__ import annotations

import pytest
import torch

from tests.support.hosts import WatchedHost
from tests.support.models import precise_gpt2, random_batch
from tests.support.straight_line import PlainGPT2
from tvac_plugin.configs.fine_tuning import LisaConfig
from tvac_plugin.defenses import Lisa
from tvac_plugin.defenses.base import Position

ALIGNMENT = [random_batch(seed=seed) for seed in range(50, 60)]
USER = [random_batch(seed=seed) for seed in range(20)]
RATE = 0.1


def run(model, config, *, num_steps, first=0, defense=None):
    """SGD with the defense; the weights after it."""
    host = WatchedHost(model, streams={"alignment": ALIGNMENT})
    defense = defense or Lisa(config, model, seed=1)
    reports = []
    for step in range(first, num_steps):
        reports.append(defense.step(host, USER[step], Position(step, True, num_steps=12)))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATE * parameter.grad
                parameter.grad = None
    return defense, reports


def algorithm_1(plain, *, k1, k2, rho, num_steps, warmup=-1):
    w = dict(plain.weights)
    w_user = w_align = {n: x.detach().clone() for n, x in w.items()}
    was_aligning = None
    for step in range(num_steps):
        is_aligning = step % (k1 + k2) < k1
        if was_aligning is not None and was_aligning != is_aligning:
            ended = {n: x.detach().clone() for n, x in w.items()}
            w_user, w_align = (w_user, ended) if was_aligning else (ended, w_align)
        was_aligning = is_aligning
        anchor = w_user if is_aligning else w_align
        g = plain.gradient(w, ALIGNMENT[step % 10] if is_aligning else USER[step])
        pull = rho if step > warmup else 0.0
        w = {n: (w[n] - RATE * (g[n] + pull * (w[n] - anchor[n]))).detach().requires_grad_() for n in w}
    return w


def assert_weights(model, expected):
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name].detach(), rtol=1e-8, atol=1e-12, msg=name)


def test_twelve_steps_equal_the_paper():
    model = precise_gpt2()
    plain = PlainGPT2(model, num_layers=4, num_heads=2)
    _, reports = run(model, LisaConfig(alignment_steps=2, user_steps=3, rho=0.7, warmup_ratio=0.25), num_steps=12)
    assert_weights(model, algorithm_1(plain, k1=2, k2=3, rho=0.7, num_steps=12, warmup=3))
    measured = [sorted(report.norms) for report in reports]
    aligned, pulled = ["alignment_norm"], ["pull_norm"]  # where a state begins there is nothing yet to pull back
    assert measured[:5] == [aligned, aligned, [], [], pulled]
    assert measured[5:] == [aligned, [*aligned, *pulled], [], pulled, pulled, aligned, [*aligned, *pulled]]
    assert [event["state"] for report in reports for event in report.events] == [
        "alignment", "user", "alignment", "user", "alignment",
    ]  # fmt: skip


@pytest.mark.parametrize("warmup_ratio", [0.25, 0.3])
def test_the_pull_begins_only_when_more_than_the_warm_up_is_over(warmup_ratio):
    # published code: a pull where steps taken > ratio * all steps; 0.25 * 12 is 3 exactly, 0.3 * 12 is 3.6
    config = LisaConfig(alignment_steps=0, user_steps=5, warmup_ratio=warmup_ratio)
    _, reports = run(precise_gpt2(), config, num_steps=6)
    assert ["pull_norm" in report.norms for report in reports] == [False] * 4 + [True] * 2


def test_no_pull_and_one_state_equal_sft():
    model, reference = precise_gpt2(), precise_gpt2()
    run(model, LisaConfig(alignment_steps=0, user_steps=5, rho=0.0), num_steps=6)
    for batch in USER[:6]:
        WatchedHost(reference).train(batch)
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter -= RATE * parameter.grad
                parameter.grad = None
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


def test_a_resumed_run_is_pulled_to_the_same_weights():
    config = LisaConfig(alignment_steps=2, user_steps=3, warmup_ratio=0.0)
    whole, parted = precise_gpt2(), precise_gpt2()
    run(whole, config, num_steps=9)
    first, _ = run(parted, config, num_steps=4)
    state = first.state_dict()
    second = Lisa(config, parted, seed=1)
    second.load_state_dict(state)
    run(parted, config, num_steps=9, first=4, defense=second)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parted.parameters(), strict=True))


def test_accumulated_user_batches_in_the_alignment_state_are_left_out():
    model = precise_gpt2()
    host = WatchedHost(model, streams={"alignment": ALIGNMENT})
    defense = Lisa(LisaConfig(alignment_steps=5), model, seed=1)
    first = defense.step(host, USER[0], Position(0, True, num_steps=10))
    gradients = [p.grad.clone() for p in model.parameters()]
    second = defense.step(host, USER[1], Position(0, False, num_steps=10))
    assert first.loss > 0
    assert second.loss == 0
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert "train" not in host.passes


def test_a_run_that_would_never_reach_the_user_s_data_is_refused():
    model = precise_gpt2()
    host = WatchedHost(model, streams={"alignment": ALIGNMENT})
    with pytest.raises(ValueError, match="lisa.alignment_steps: 100 is not less than the 60 steps.*Set it lower"):
        Lisa(LisaConfig(), model, seed=1).step(host, USER[0], Position(0, True, num_steps=60))
