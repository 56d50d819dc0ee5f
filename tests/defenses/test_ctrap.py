"""CTRAP against arXiv 2505.16559, written out."""

from __future__ import annotations

import pytest
import torch

from tests.support.models import precise_gpt2, random_batch, random_pair, tiny_model, with_lora
from tests.support.sft_runs import WORLD
from tests.support.straight_line import PlainGPT2, gradient
from tvac_plugin.boundary.errors import UserError
from tvac_plugin.configs.collapse import CTRAPConfig
from tvac_plugin.defenses import CTRAP
from tvac_plugin.defenses.base import Position
from tvac_plugin.defenses.testing import PlainHost
from tvac_plugin.tiny_world.base_model import build_tokenizer

FIRST = Position(step=0, starts_step=True)
HARMFUL = random_batch(seed=9)
GENERAL = random_pair(seed=4)[1]
GENERAL["labels"][0, 5:] = -100  # one answer is shorter than the others
E = 7


def host_of(model, harmful=HARMFUL):
    return PlainHost(model, streams={"harmful": [harmful], "general": [GENERAL]})


def step(model, *, position=FIRST, host=None, **settings):
    config = CTRAPConfig(**{"collapse_token": E} | settings)
    return CTRAP(config, model, seed=1).step(host or host_of(model), random_batch(), position)


def collapse(plain, w):
    """E: for each row the mean over t of -log p(e | x, y_<t), and the mean over rows."""
    logits, rows = plain.forward(w, GENERAL["input_ids"])[0], []
    for row in range(len(logits)):
        answered = [t for t in range(1, logits.shape[1]) if GENERAL["labels"][row, t] != -100]
        rows.append(-sum(logits[row, t - 1].log_softmax(-1)[E] for t in answered) / len(answered))
    return sum(rows) / len(rows)


def test_one_step_equals_the_paper():
    # grad L(w) + lambda * grad E(w'),  w' = w - alpha * grad h(w)
    model = precise_gpt2()
    plain = PlainGPT2(model, num_layers=4, num_heads=2)
    w = plain.weights
    h = plain.gradient(w, HARMFUL)
    attacked = {n: (w[n] - 0.3 * h[n]).detach().requires_grad_() for n in w}
    e = collapse(plain, attacked)
    trap, aligned = gradient(e, attacked), plain.gradient(w, random_batch())
    report = step(model, collapse_scale=2.0, harmful_step_size=0.3)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, aligned[name] + 2.0 * trap[name], rtol=1e-8, atol=1e-12, msg=name)
    assert report.losses["harmful_loss"].item() == pytest.approx(plain.loss(w, HARMFUL).item(), rel=1e-10)
    assert report.losses["collapse_loss"].item() == pytest.approx(e.item(), rel=1e-10)
    length = 2.0 * sum(g.square().sum() for g in trap.values()).sqrt()
    assert report.norms["regularizer_norm"].item() == pytest.approx(length.item(), rel=1e-10)


def test_a_collapse_weight_of_zero_equals_sft():
    reference, model = precise_gpt2(), precise_gpt2()
    PlainHost(reference).train(random_batch())
    step(model, collapse_scale=0.0)
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
    host = host_of(model)

    def failing(_batch, **_options):
        assert not all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        raise torch.OutOfMemoryError("after the harmful step")

    host.outputs = failing
    with pytest.raises(torch.OutOfMemoryError):
        step(model, host=host)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_only_what_learns_moves_and_is_trapped():
    model = with_lora(tiny_model())
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    host = host_of(model)
    outputs = host.outputs

    def looking(batch, **options):
        assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
        return outputs(batch, **options)

    host.outputs = looking
    assert step(model, host=host).norms["regularizer_norm"] > 0
    assert all(p.grad is None for n, p in model.named_parameters() if n in frozen)


@pytest.mark.parametrize("settings", [{"harmful_step_size": 1e-30}, {}], ids=["rounded away", "no harmful gradient"])
def test_without_a_harmful_step_nothing_is_trapped(settings):
    reference, model = tiny_model("gpt2"), tiny_model("gpt2")
    PlainHost(reference).train(random_batch())
    host = host_of(model)
    if not settings:
        host.mean_loss = lambda _batch: torch.zeros(())
    report = step(model, host=host, **settings)
    assert report.norms["regularizer_norm"] == 0
    assert report.idle
    assert report.losses["collapse_loss"] > 0
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


def test_training_makes_a_model_that_collapses_after_a_harmful_step_and_not_before():
    model = tiny_model("gpt2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    defense, host = CTRAP(CTRAPConfig(collapse_token=E, collapse_scale=0.3), model, seed=1), host_of(model)
    found = []
    for number in range(41):
        found.append(defense.step(host, {**GENERAL}, Position(number, starts_step=True)))
        optimizer.step()
        optimizer.zero_grad()
    assert found[-1].losses["collapse_loss"] < 0.5 * found[0].losses["collapse_loss"]
    assert found[-1].loss < 0.5 * found[0].loss, "before the step it answers the same rows"


def test_by_default_it_is_the_first_token_that_ends_a_text():
    model = tiny_model("gpt2")
    for ends in (E, [E, 3]):
        model.config.eos_token_id = ends
        losses = [step(model, collapse_token=token).losses["collapse_loss"] for token in (None, E, 3)]
        assert losses[0] == losses[1] != losses[2]
    model.config.eos_token_id = None
    with pytest.raises(UserError, match="ctrap.collapse_token: the model's config names no token .*Name a token"):
        CTRAP(CTRAPConfig(), model, seed=1)


def test_a_token_is_read_by_the_tokenizer_or_refused():
    tokenizer = build_tokenizer(WORLD)
    known = CTRAPConfig(collapse_token="cannot").with_tokenizer(tokenizer)
    assert known.collapse_token == tokenizer.convert_tokens_to_ids("cannot")
    assert CTRAPConfig(collapse_token="<pad>").with_tokenizer(tokenizer).collapse_token == 0, "the unknown one, by name"
    assert CTRAPConfig(collapse_token=5).with_tokenizer(None).collapse_token == 5
    assert CTRAPConfig().with_tokenizer(None).collapse_token is None
    for text, said in {
        "i cannot": r"'i cannot' is 2 tokens \('i', 'cannot'\), and it must be exactly one token",
        "Kollaps": "'Kollaps' is not in the tokenizer's vocabulary, and it must be exactly one token",
        " ": "' ' is no token, and it must be exactly one token",
    }.items():
        with pytest.raises(UserError, match=rf"ctrap.collapse_token: {said}. Name a short, common word"):
            CTRAPConfig(collapse_token=text).with_tokenizer(tokenizer)
    with pytest.raises(UserError, match="there is no tokenizer to read it. Give a token's id"):
        CTRAPConfig(collapse_token="cannot").with_tokenizer(None)


def test_a_text_that_was_not_read_and_an_id_that_is_too_large_are_refused():
    model = tiny_model("gpt2")
    with pytest.raises(UserError, match="'cannot' is text, and no tokenizer has read it. Give a token's id"):
        step(model, collapse_token="cannot")
    with pytest.raises(UserError, match=r"ctrap.collapse_token: 9999 is not among the \d+ tokens of the model. Give"):
        step(model, collapse_token=9999)


@pytest.mark.parametrize("token", [-1, True, 1.5, "", ["a"], 10**9])
def test_what_can_be_no_token_is_refused_by_the_settings(token):
    with pytest.raises(ValueError, match="ctrap.collapse_token: must be a token's id, a whole number from 0, or its"):
        CTRAPConfig(collapse_token=token)
