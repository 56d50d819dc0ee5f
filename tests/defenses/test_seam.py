"""SEAM against arXiv 2505.12186, written out."""

from __future__ import annotations

import pytest
import torch

from tests.support.models import precise_gpt2, random_batch, random_pair, tiny_model, with_lora
from tests.support.straight_line import PlainGPT2, gradient
from tvac_plugin.configs.collapse import SEAMConfig
from tvac_plugin.defenses import SEAM
from tvac_plugin.defenses.base import Position
from tvac_plugin.defenses.testing import PlainHost

FIRST = Position(step=0, starts_step=True)
HARMFUL, REFUSAL = PAIR = random_pair(seed=4)
BENIGN = random_batch(seed=9)
DIFFER = HARMFUL["input_ids"] != REFUSAL["input_ids"]


def host_of(model):
    return PlainHost(model, streams={"pairs": [PAIR], "benign": [BENIGN]})


def step(model, *, position=FIRST, host=None, **settings):
    return SEAM(SEAMConfig(**settings), model, seed=1).step(host or host_of(model), random_batch(), position)


def masked_loss(logits, batch):
    """Mean of -log p over the answer tokens at which the two answers differ, one by one."""
    tokens = [
        -logits[row, t - 1].log_softmax(-1)[batch["labels"][row, t]]
        for row in range(len(logits))
        for t in range(1, logits.shape[1])
        if DIFFER[row, t] and batch["labels"][row, t] != -100
    ]
    return torch.stack(tokens).mean()


def attack(plain, w):
    return masked_loss(plain.forward(w, HARMFUL["input_ids"])[0], HARMFUL)


def length(g):
    return sum(x.square().sum() for x in g.values()).sqrt()


def test_one_step_equals_the_paper():
    # grad [ L(w; B) + alpha * CE_m(x_s) - log(1 + A) ] + beta / e * (D_a / |g_a| + D_b / |g_b|)
    model = precise_gpt2()
    plain = PlainGPT2(model, num_layers=4, num_heads=2)
    w, beta, e = plain.weights, 0.5, 0.01
    logits, depths, _ = plain.forward(w, HARMFUL["input_ids"])
    lens = [masked_loss(plain.head(w, h), HARMFUL) for h in depths[:-1]]
    a = (sum(lens) + masked_loss(logits, HARMFUL)) / 5
    s = masked_loss(plain.forward(w, REFUSAL["input_ids"])[0], REFUSAL)
    direct = gradient(plain.loss(w, random_batch()) + 0.9 * s - 0.7 * (1 + a).log(), w)

    g_a, g_b = gradient(attack(plain, w), w), plain.gradient(w, BENIGN)
    n_a, n_b = length(g_a), length(g_b)
    c = sum((g_a[n] * g_b[n]).sum() for n in w) / (n_a * n_b)
    near_a = {n: (w[n] + e * (g_b[n] / n_b - c * g_a[n] / n_a)).detach().requires_grad_() for n in w}
    near_b = {n: (w[n] + e * (g_a[n] / n_a - c * g_b[n] / n_b)).detach().requires_grad_() for n in w}
    after_a, after_b = gradient(attack(plain, near_a), near_a), plain.gradient(near_b, BENIGN)
    d = {n: beta / e * ((after_a[n] - g_a[n]) / n_a + (after_b[n] - g_b[n]) / n_b) for n in w}

    report = step(model, unlearning_scale=0.7, refusal_scale=0.9, self_destruct_scale=beta, probe_step_size=e)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, direct[name] + d[name], rtol=1e-7, atol=1e-10, msg=name)
    found = {name: loss.item() for name, loss in report.losses.items()}
    assert found == pytest.approx(
        {"refusal_loss": s.item(), "harmful_loss": a.item(), "self_destruct_loss": c.item()}, rel=1e-9
    )
    assert report.norms["self_destruct_norm"].item() == pytest.approx(length(d).item(), rel=1e-7)


def test_its_term_is_the_gradient_of_the_cosine():
    # by double backward, without any step: d cos(g_a, g_b) / dw
    model = precise_gpt2()
    plain = PlainGPT2(model, num_layers=4, num_heads=2)
    w = plain.weights
    g_a, g_b = (
        dict(zip(w, torch.autograd.grad(loss, list(w.values()), create_graph=True), strict=True))
        for loss in (attack(plain, w), plain.loss(w, BENIGN))
    )
    cosine = sum((g_a[n] * g_b[n]).sum() for n in w) / (length(g_a) * length(g_b))
    exact = gradient(cosine, w)
    settings = {"unlearning_scale": 0.0, "refusal_scale": 0.0, "self_destruct_scale": 1.0, "probe_step_size": 1e-5}
    step(model, **settings)
    aligned = plain.gradient(w, random_batch())
    off = sum((p.grad - aligned[n] - exact[n]).square().sum() for n, p in model.named_parameters()).sqrt()
    assert off < 1e-3 * length(exact)


def test_scales_of_zero_equal_sft():
    reference, model = precise_gpt2(), precise_gpt2()
    PlainHost(reference).train(random_batch())
    step(model, unlearning_scale=0.0, refusal_scale=0.0, self_destruct_scale=0.0)
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-15)


def test_later_micro_batches_of_a_step_only_train():
    reference, model = precise_gpt2(), precise_gpt2()
    PlainHost(reference).train(random_batch())
    report = step(model, position=Position(step=0, starts_step=False))
    assert not report.norms
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_are_put_back_bit_for_bit(dtype):
    model = tiny_model("gpt2").to(dtype)
    before = [p.detach().clone() for p in model.parameters()]
    step(model)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_the_weights_are_put_back_when_a_pass_fails():
    model = tiny_model("gpt2")
    before = [p.detach().clone() for p in model.parameters()]
    host, calls = host_of(model), []
    mean_loss = host.mean_loss

    def failing(batch):
        calls.append(batch)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("after the step along the harmful gradient")
        return mean_loss(batch)

    host.mean_loss = failing
    with pytest.raises(torch.OutOfMemoryError):
        step(model, host=host)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_only_what_learns_moves_and_stays_all_that_learns():
    model = with_lora(tiny_model())
    learns = [p.requires_grad for p in model.parameters()]
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    report = step(model)
    assert [p.requires_grad for p in model.parameters()] == learns
    assert all(torch.equal(p, frozen[n]) and p.grad is None for n, p in model.named_parameters() if n in frozen)
    assert report.norms["self_destruct_norm"] > 0


def test_a_gradient_and_what_it_becomes_see_the_same_dropout():
    # otherwise the difference of the masks, divided by the step's length, would drown that of the step
    model = with_lora(tiny_model(), dropout=0.5)
    torch.manual_seed(3)
    settings = {"unlearning_scale": 0.0, "refusal_scale": 0.0, "self_destruct_scale": 1.0}
    near, far = (step(model, probe_step_size=e, **settings).norms["self_destruct_norm"] for e in (1e-3, 1e-2))
    assert near < 2 * far


def test_steps_that_rounding_takes_away_count_as_no_defense():
    model = tiny_model("gpt2").to(torch.bfloat16)
    with torch.no_grad():
        for weight in model.parameters():
            weight += torch.where(weight == 0, 1.0, 0.0)
    report = step(model, probe_step_size=1e-6)
    assert report.norms["regularizer_norm"] > 0
    assert report.norms["self_destruct_norm"] == 0
    assert report.idle


def test_training_couples_harm_to_what_the_model_can_do():
    model = tiny_model("gpt2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    settings = {"unlearning_scale": 0.0, "refusal_scale": 0.0, "self_destruct_scale": 1.0}
    defense, host, found = SEAM(SEAMConfig(**settings), model, seed=1), host_of(model), []
    for number in range(30):
        found.append(
            defense.step(host, random_batch(), Position(number, starts_step=True)).losses["self_destruct_loss"]
        )
        optimizer.step()
        optimizer.zero_grad()
    assert found[0] > -0.5
    assert found[-1] < found[0] - 0.3


def test_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model("llama")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        step(model)
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
