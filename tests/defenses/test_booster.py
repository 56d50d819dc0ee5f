"""Booster against arXiv 2409.01586, equation 3, written out."""

from __future__ import annotations

import pytest
import torch

from tests.support.models import precise_gpt2, random_batch, tiny_model, with_lora
from tests.support.straight_line import PlainGPT2
from tvac_plugin.configs.unlearning import BoosterConfig
from tvac_plugin.defenses import Booster
from tvac_plugin.defenses.base import Position
from tvac_plugin.defenses.testing import PlainHost

FIRST = Position(step=0, starts_step=True)
HARMFUL = random_batch(seed=9)


def step(model, *, position=FIRST, **settings):
    host = PlainHost(model, streams={"harmful": [HARMFUL]})
    return Booster(BoosterConfig(**settings), model, seed=1).step(host, random_batch(), position)


def test_one_step_equals_the_paper():
    # grad f(w) + lambda * [grad h(w) - grad h(w - alpha * grad h(w) / ||grad h(w)||)]
    model = precise_gpt2()
    plain = PlainGPT2(model, num_layers=4, num_heads=2)
    w = plain.weights
    g = plain.gradient(w, HARMFUL)
    length = sum(x.pow(2).sum() for x in g.values()).sqrt() + 1e-7
    moved = {n: (w[n] - 0.3 * g[n] / length).detach().requires_grad_() for n in w}
    g_after, f = plain.gradient(moved, HARMFUL), plain.gradient(w, random_batch())
    report = step(model, regularizer_scale=2.0, harmful_step_size=0.3)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, f[name] + 2.0 * (g[name] - g_after[name]), rtol=1e-8, atol=1e-12, msg=name
        )
    assert report.losses["harmful_loss"].item() == pytest.approx(plain.loss(w, HARMFUL).item(), rel=1e-10)
    assert report.losses["harmful_loss_after_step"] < report.losses["harmful_loss"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_are_put_back_bit_for_bit(dtype):
    model = tiny_model("gpt2").to(dtype)
    before = [p.detach().clone() for p in model.parameters()]
    step(model)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_the_weights_are_put_back_when_a_pass_fails():
    model = tiny_model("gpt2")
    before = [p.detach().clone() for p in model.parameters()]
    host = PlainHost(model, streams={"harmful": [HARMFUL]})
    calls = []

    def failing(batch):
        calls.append(batch)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("after the harmful step")
        return model(**batch).loss

    host.mean_loss = failing
    with pytest.raises(torch.OutOfMemoryError):
        Booster(BoosterConfig(), model, seed=1).step(host, random_batch(), FIRST)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_lambda_zero_equals_sft():
    reference, model = precise_gpt2(), precise_gpt2()
    PlainHost(reference).train(random_batch())
    step(model, regularizer_scale=0.0)
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-15)


def test_both_harmful_passes_see_the_same_dropout():
    model = with_lora(tiny_model(), dropout=0.5)
    torch.manual_seed(3)
    report = step(model, harmful_step_size=1e-9)
    assert report.losses["harmful_loss"].item() == pytest.approx(
        report.losses["harmful_loss_after_step"].item(), rel=1e-5
    )


def test_later_micro_batches_of_a_step_only_train():
    reference, model = precise_gpt2(), precise_gpt2()
    PlainHost(reference).train(random_batch())
    report = step(model, position=Position(step=0, starts_step=False))
    assert not report.norms
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), reference.parameters(), strict=True))
