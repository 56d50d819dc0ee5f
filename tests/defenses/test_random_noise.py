"""Noise of a fixed norm in a random direction, the control for every perturbation."""

from __future__ import annotations

import pytest
import torch

from tests.support.models import precise_gpt2, random_batch, tiny_model, with_lora
from tests.support.straight_line import PlainGPT2, gradient
from tvac_plugin.configs.perturbation import RandomNoiseConfig
from tvac_plugin.defenses import RandomNoise
from tvac_plugin.defenses.base import Position
from tvac_plugin.defenses.testing import PlainHost

FIRST = Position(step=0, starts_step=True)


def captured_noise(monkeypatch):
    """Every z that is drawn, in the order of the layers."""
    drawn, randn = [], torch.randn
    monkeypatch.setattr(torch, "randn", lambda *a, **k: drawn.append(randn(*a, **k)) or drawn[-1])
    return drawn


@pytest.mark.parametrize("rho_scope", ["batch", "sample"])
def test_one_step_equals_the_formula(monkeypatch, rho_scope):
    # eps_l = rho / sqrt(L) * z_l / ||z_l||; gradient of L(w; e + eps)
    model, batch = precise_gpt2(), random_batch()
    plain, drawn = PlainGPT2(model, num_layers=4, num_heads=2), captured_noise(monkeypatch)
    defense = RandomNoise(RandomNoiseConfig(rho=1.5, rho_scope=rho_scope), model, seed=1)
    report = defense.step(PlainHost(model), batch, FIRST)
    assert len(drawn) == 4
    dims = (0, 1, 2) if rho_scope == "batch" else (1, 2)
    eps = [1.5 / 2 * z / z.pow(2).sum(dims, keepdim=True).sqrt() for z in drawn]
    expected = gradient(plain.loss(plain.weights, batch, eps), plain.weights)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-8, atol=1e-12)
    budget = 1.5 if rho_scope == "batch" else 1.5 * 3**0.5
    assert report.norms["perturbation_norm"].item() == pytest.approx(budget, rel=1e-10)


def test_rho_zero_equals_sft():
    reference, model, batch = precise_gpt2(), precise_gpt2(), random_batch()
    PlainHost(reference).train(batch)
    RandomNoise(RandomNoiseConfig(rho=0.0), model, seed=1).step(PlainHost(model), batch, FIRST)
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_checkpointing_adds_the_same_noise_again():
    gradients = []
    for checkpointing in (False, True):
        model = with_lora(tiny_model(), dropout=0.3)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(7)
        RandomNoise(RandomNoiseConfig(), model, seed=1).step(PlainHost(model), random_batch(), FIRST)
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_noise_differs_by_batch_and_seed_and_is_found_again_after_a_resume(monkeypatch):
    drawn = captured_noise(monkeypatch)
    model, batch = precise_gpt2(), random_batch()
    first = RandomNoise(RandomNoiseConfig(), model, seed=1)
    first.step(PlainHost(model), batch, FIRST)
    state = first.state_dict()
    first.step(PlainHost(model), batch, FIRST)
    resumed = RandomNoise(RandomNoiseConfig(), model, seed=1)
    resumed.load_state_dict(state)
    resumed.step(PlainHost(model), batch, FIRST)
    RandomNoise(RandomNoiseConfig(), model, seed=2).step(PlainHost(model), batch, FIRST)
    one, two, again, other = (drawn[i * 4] for i in range(4))
    assert not torch.equal(one, two)
    assert torch.equal(two, again)
    assert not torch.equal(one, other)
    assert not torch.equal(drawn[0], drawn[1])
