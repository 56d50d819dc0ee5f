"""TAR against arXiv 2408.00761, Algorithm 1, written out with an AdamW of its own."""

from __future__ import annotations

import math

import pytest
import torch

from tests.support.models import precise_gpt2, random_batch, random_pair, tiny_model
from tests.support.straight_line import PlainGPT2, answer_log_probabilities, gradient
from tvac_plugin.configs.unlearning import TARConfig
from tvac_plugin.defenses import TAR
from tvac_plugin.defenses.base import Position
from tvac_plugin.defenses.testing import PlainHost

FIRST = Position(step=0, starts_step=True)
ADVERSARY = [random_batch(seed=seed) for seed in range(30, 36)]
BENIGN = [random_batch(seed=seed) for seed in range(40, 46)]
RETAIN = random_batch(seed=77)
RATE = 1e-2


def config(**changes):
    settings = {
        "inner_steps": 5, "tamper_every": 2, "adversary_learning_rates": [RATE], "tamper_scale": 1.5,
        "retain_scale": 0.6, "representation_scale": 0.8, "schedule_decay": 0.25, "switch_share": 1.0,
    }  # fmt: skip
    return TARConfig(**settings | changes)


def streams(settings, *, retain=False):
    tamper = [random_pair()] if settings.tamper_loss == "dpo" else [random_batch(seed=9)]
    extra = {"benign": BENIGN, "retain": [RETAIN]} if retain else {}
    return {"adversary": ADVERSARY, "tamper": tamper, **extra}


def step(model, settings, *, retain=False, position=FIRST, moved_by=0.0):
    """One step; `moved_by` shifts the weights after the defense took its reference."""
    defense = TAR(settings, model, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += moved_by
    return defense.step(PlainHost(model, streams=streams(settings, retain=retain)), random_batch(), position)


def adam_steps(plain, w, batches):
    """AdamW as its paper has it (arXiv 1711.05101), with PyTorch's defaults; the weights after each batch."""
    m = {n: torch.zeros_like(x) for n, x in w.items()}
    v = {n: torch.zeros_like(x) for n, x in w.items()}
    for t, batch in enumerate(batches, start=1):
        g = plain.gradient(w, batch)
        m = {n: 0.9 * m[n] + 0.1 * g[n] for n in w}
        v = {n: 0.999 * v[n] + 0.001 * g[n] ** 2 for n in w}
        w = {
            n: (
                (1 - RATE * 0.01) * w[n]
                - RATE * (m[n] / (1 - 0.9**t)) / ((v[n] / (1 - 0.999**t)).sqrt() + 1e-8)
            ).detach().requires_grad_()
            for n in w
        }  # fmt: skip
        yield w


def row_log_probability(plain, w, batch):
    logits = plain.forward(w, batch["input_ids"])[0]
    rows = [{"labels": batch["labels"][row : row + 1]} for row in range(len(logits))]
    return torch.stack([sum(answer_log_probabilities(logits[r : r + 1], rows[r])) for r in range(len(rows))])


def dpo(plain, w, reference):
    harmful, refusal = random_pair()
    margin = row_log_probability(plain, w, refusal) - row_log_probability(plain, w, harmful)
    base = row_log_probability(plain, reference, refusal) - row_log_probability(plain, reference, harmful)
    return -(1 / (1 + torch.exp(-0.1 * (margin - base.detach())))).log().mean()


def negative_entropy(plain, w, _reference):
    batch = random_batch(seed=9)
    logits, values = plain.forward(w, batch["input_ids"])[0], []
    for row in range(len(logits)):
        for t in range(1, logits.shape[1]):
            if batch["labels"][row, t] != -100:
                p = logits[row, t - 1].softmax(-1)
                values.append((p * p.log()).sum())
    return torch.stack(values).mean()


def distance(plain, w, reference, batch):
    now, before = (plain.forward(weights, batch["input_ids"])[1] for weights in (w, reference))
    return sum((a - b.detach()).pow(2).sum(-1).sqrt().mean() for a, b in zip(now, before, strict=True)) / len(now)


@pytest.mark.parametrize(("tamper_loss", "expected_loss"), [("dpo", dpo), ("entropy", negative_entropy)])
@pytest.mark.parametrize("retain", [False, True])
def test_one_step_equals_the_paper(tamper_loss, expected_loss, retain):
    settings = config(tamper_loss=tamper_loss)
    model = precise_gpt2()
    reference = {n: w.detach().clone() for n, w in PlainGPT2(model, num_layers=4, num_heads=2).weights.items()}
    report = step(model, settings, retain=retain, moved_by=0.01)
    plain = PlainGPT2(model, num_layers=4, num_heads=2)
    w = plain.weights

    import random

    rng = random.Random(1 * 1_000_003)
    rng.choice([RATE])
    rng.random() if retain else None  # whether this step's adversary switches
    num_benign = math.floor(5 * rng.betavariate(6.0, 3.0)) if retain else 0
    batches = [*BENIGN[:num_benign], *ADVERSARY[num_benign:5]]
    tamper = {n: torch.zeros_like(x) for n, x in w.items()}
    for k, attacked in enumerate(adam_steps(plain, w, batches)):
        if (k + 1) % 2 == 0:
            g = gradient(expected_loss(plain, attacked, reference), attacked)
            tamper = {n: tamper[n] + math.exp(0.25 * (k - 4)) * g[n] for n in w}
    if retain:
        kept = 0.8 * distance(plain, w, reference, RETAIN) + plain.loss(w, RETAIN)
    else:
        kept = 0.8 * distance(plain, w, reference, random_batch())
    outer = gradient(plain.loss(w, random_batch()) + 0.6 * kept, w)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, outer[name] + 1.5 * tamper[name], rtol=1e-8, atol=1e-10, msg=f"{name}"
        )
    assert report.losses["retain_loss"].item() == pytest.approx(kept.item(), rel=1e-8)
    assert 0 < num_benign < 5 or not retain, "both kinds of inner step are meant to happen"


def test_the_parameter_gradient_really_contains_the_tamper_gradient():
    with_tamper, without = precise_gpt2(), precise_gpt2()
    report = step(with_tamper, config())
    step(without, config(tamper_scale=0.0))
    changes = [
        (a.grad - b.grad).pow(2).sum() for a, b in zip(with_tamper.parameters(), without.parameters(), strict=True)
    ]
    assert sum(changes).sqrt().item() == pytest.approx(1.5 * report.norms["tamper_norm"].item(), rel=1e-6)
    assert report.norms["tamper_norm"] > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_are_put_back_bit_for_bit(dtype):
    model = tiny_model("gpt2").to(dtype)
    before = [p.detach().clone() for p in model.parameters()]
    step(model, config())
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_the_weights_are_put_back_when_the_adversary_fails():
    model = tiny_model("gpt2")
    before = [p.detach().clone() for p in model.parameters()]
    host = PlainHost(model, streams=streams(config()))
    mean_loss = host.mean_loss

    def failing(batch):
        if batch is ADVERSARY[3]:
            raise torch.OutOfMemoryError("third inner step")
        return mean_loss(batch)

    host.mean_loss = failing
    with pytest.raises(torch.OutOfMemoryError):
        TAR(config(), model, seed=1).step(host, random_batch(), FIRST)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_scales_of_zero_equal_sft():
    reference, model = precise_gpt2(), precise_gpt2()
    PlainHost(reference).train(random_batch())
    step(model, config(tamper_scale=0.0, retain_scale=0.0))
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-15)


def test_the_adversary_s_learning_rate_is_drawn_anew_for_each_step(monkeypatch):
    rates, adam = [], torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda weights, lr: rates.append(lr) or adam(weights, lr=lr))
    settings, model = config(adversary_learning_rates=[1e-4, 1e-3], inner_steps=2), tiny_model("gpt2")
    for number in range(12):
        step(model, settings, position=Position(number, True))
    assert set(rates) == {1e-4, 1e-3}


@pytest.mark.parametrize(("switch_share", "least", "most"), [(0.0, 0, 0), (0.33, 7, 20), (1.0, 40, 40)])
def test_a_third_of_the_adversaries_switches_from_benign_to_harmful_rows(switch_share, least, most):
    # published script: one of three kinds of adversary switches, drawn anew for each optimizer step
    settings, model = (
        config(switch_share=switch_share, inner_steps=6, tamper_every=6, tamper_loss="entropy"),
        tiny_model("gpt2"),
    )
    attacks = []
    for number in range(40):
        read, defense = [], TAR(settings, model, seed=1)
        host = PlainHost(model, streams=streams(settings, retain=True))
        batch_of = host.batch
        host.batch = lambda name, index, batch_of=batch_of, read=read: read.append(name) or batch_of(name, index)
        defense._tamper_resistance(host, number)
        attacks.append([name for name in read if name in ("benign", "adversary")])
    assert all(names == sorted(names, key="benign adversary".index) and len(names) == 6 for names in attacks)
    assert all("adversary" in names for names in attacks)
    assert least <= sum("benign" in names for names in attacks) <= most


def test_without_retain_data_a_model_that_answers_would_be_kept_answering_and_the_user_is_told():
    (advice,) = TARConfig().advice(["harmful_datasets", "refusal_datasets"])
    assert "Start from a merged aligned model" in advice
    assert "retain_datasets: [{path:" in advice
    assert TARConfig().advice(["retain_datasets"]) == [] == TARConfig(retain_scale=0.0).advice([])


def test_a_tamper_loss_that_never_comes_is_refused():
    with pytest.raises(ValueError, match="tar.tamper_every: 9 is more than inner_steps"):
        config(tamper_every=9)
