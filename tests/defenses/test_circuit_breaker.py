"""Circuit breakers against arXiv 2406.04313, Algorithm 1, written out."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.support.models import random_batch, tiny_model, with_lora
from tests.support.straight_line import PlainAdapter
from tvac_plugin.boundary.errors import UserError
from tvac_plugin.configs.representations import CircuitBreakerConfig
from tvac_plugin.defenses import CircuitBreaker
from tvac_plugin.defenses.base import Position
from tvac_plugin.defenses.circuit_breaker import scales
from tvac_plugin.defenses.testing import PlainHost
from tvac_plugin.model.adapters import adapter_off

FIRST = Position(step=0, starts_step=True, num_steps=10)
HARMFUL, BENIGN = random_batch(seed=9), random_batch(seed=10)
BENIGN["attention_mask"][:, -2:] = 0
BENIGN["labels"][:, -2:] = -100


def precise_model():
    """A GPT-2 of four layers in float64 under a LoRA that learnt already."""
    return with_lora(tiny_model("gpt2")).double()


def new_adapter(**changes):
    """The same as PEFT starts it: the second half is zero."""
    torch.manual_seed(0)
    return get_peft_model(tiny_model("gpt2"), LoraConfig(**{"r": 2, "target_modules": "all-linear"} | changes)).train()


def step(model, *, position=FIRST, streams=None, **settings):
    host = PlainHost(model, streams or {"harmful": [HARMFUL], "benign": [BENIGN]})
    return CircuitBreaker(CircuitBreakerConfig(**settings), model, seed=1).step(host, random_batch(), position)


def learnt(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def straight_line(plain, *, t, num_steps, alpha, layers, benign, r=1.0):
    """Loss of Algorithm 1, token by token."""
    after, before = plain.states(plain.adapted(), HARMFUL), plain.states(plain.base, HARMFUL)
    cosines = [
        torch.relu(after[layer][i, j] @ before[layer][i, j] / after[layer][i, j].norm() / before[layer][i, j].norm())
        for layer in layers
        for i, j in (HARMFUL["labels"] != -100).nonzero().tolist()
    ]
    after, before = plain.states(plain.adapted(), benign), plain.states(plain.base, benign)
    distances = [
        (after[depth][i, j] - before[depth][i, j]).pow(2).sum().sqrt()
        for depth in range(1, 5)
        for i, j in benign["attention_mask"].nonzero().tolist()
    ]
    reroute = sum(cosines) / len(cosines)
    retain = sum(distances) / (len(distances) * 5 / 4)  # the embeddings, a fifth of all depths, do not move
    share = t / (2 * num_steps)
    return alpha * (1 - share) * reroute + r * alpha * share * retain + plain.loss(random_batch()), reroute, retain


@pytest.mark.parametrize("has_retain_data", [True, False])
def test_one_step_equals_the_paper(has_retain_data):
    # c_s = alpha * (1 - t / 2T), c_r = r * alpha * t / 2T, L = L(B) + c_s * relu(cos(h', h)) + c_r * ||b' - b||
    model = precise_model()
    plain = PlainAdapter(model, num_layers=4, num_heads=2, lora_scale=2.0)
    benign = BENIGN if has_retain_data else random_batch()
    loss, reroute, retain = straight_line(plain, t=4, num_steps=10, alpha=3.0, layers=[1, 3], benign=benign, r=0.7)
    streams = {"harmful": [HARMFUL]} | ({"benign": [BENIGN]} if has_retain_data else {})
    report = step(model, position=Position(3, True, 10), streams=streams, alpha=3.0, retain_scale=0.7)
    for name, gradient in plain.gradients(loss).items():
        torch.testing.assert_close(learnt(model)[name], gradient, rtol=1e-8, atol=1e-12, msg=name)
    assert report.losses["reroute_loss"].item() == pytest.approx(reroute.item(), rel=1e-10)
    assert report.losses["retain_loss"].item() == pytest.approx(retain.item(), rel=1e-10)


def test_layers_may_be_named():
    by_number, by_depth = precise_model(), precise_model()
    step(by_number, layers=[3, 1])
    step(by_depth, depths=[0.25, 0.75])
    assert all(torch.equal(gradient, learnt(by_depth)[name]) for name, gradient in learnt(by_number).items())


def test_layers_10_and_20_of_32_are_the_default():
    assert CircuitBreakerConfig().layers_of(32) == [10, 20]
    assert CircuitBreakerConfig().layers_of(1) == [1]


def test_alpha_zero_equals_sft():
    reference, model = precise_model(), precise_model()
    PlainHost(reference).train(random_batch())
    step(model, alpha=0.0)
    for name, gradient in learnt(model).items():
        torch.testing.assert_close(gradient, learnt(reference)[name], rtol=1e-12, atol=1e-15)


def test_later_micro_batches_of_a_step_only_train():
    reference, model = precise_model(), precise_model()
    PlainHost(reference).train(random_batch())
    report = step(model, position=Position(step=0, starts_step=False))
    assert not report.norms
    assert all(torch.equal(gradient, learnt(reference)[name]) for name, gradient in learnt(model).items())


def test_the_weight_of_rerouting_falls_to_half_and_that_of_retaining_rises_to_half():
    ramp = [scales(CircuitBreakerConfig(), Position(step, True, 4)) for step in range(4)]
    assert ramp == [(8.75, 1.25), (7.5, 2.5), (6.25, 3.75), (5.0, 5.0)]


def test_without_a_known_length_every_step_counts_as_the_last():
    config = CircuitBreakerConfig(retain_scale=0.5)
    assert scales(config, Position(7, True)) == scales(config, Position(0, True)) == (5.0, 2.5)


def test_a_new_adapter_starts_to_move():
    # cos(h', h) is at its maximum at h' = h and ||b' - b|| at its minimum: the paper's loss has no gradient there
    model = new_adapter()
    report = step(model)
    assert report.losses["reroute_loss"] == pytest.approx(1.0, abs=1e-5)
    assert report.losses["retain_loss"] == 0
    assert report.norms["retain_norm"] == 0, "the gradient of a distance of zero is zero and not NaN"
    assert 0 < report.norms["reroute_norm"] < 1
    assert not report.idle
    assert all(gradient.isfinite().all() for gradient in learnt(model).values())


def test_the_first_direction_depends_on_seed_and_batch_alone():
    def first(seed, index=0):
        model = new_adapter()
        host = PlainHost(model, {"harmful": [HARMFUL], "benign": [BENIGN]})
        breaker = CircuitBreaker(CircuitBreakerConfig(), model, seed=seed)
        return breaker.step(host, random_batch(), Position(index, True, 10)).norms["reroute_norm"]

    assert first(1) == first(1)
    assert len({first(1).item(), first(2).item()}) == 2


def test_a_breaker_that_is_done_is_not_idle():
    # all states turned round: relu(cos) is 0, and so is its gradient
    model = precise_model()
    breaker = CircuitBreaker(CircuitBreakerConfig(), model, seed=1)
    paired = breaker._paired

    def turned(host, batch):
        both = paired(host, batch)
        before = both.before._replace(hidden_states=tuple(-h.detach() for h in both.now.hidden_states))
        return both._replace(before=before)

    turned.weights, turned.layers = paired.weights, paired.layers
    breaker._paired = turned
    report = breaker.step(PlainHost(model, {"harmful": [HARMFUL]}), random_batch(), FIRST)
    assert report.norms["reroute_norm"] == 0
    assert not report.idle


@pytest.mark.parametrize("fault", ["no answers", "not finite"])
def test_a_breaker_that_does_nothing_is_idle(fault):
    model = precise_model()
    harmful = HARMFUL | ({"labels": torch.full_like(HARMFUL["labels"], -100)} if fault == "no answers" else {})
    host = PlainHost(model, {"harmful": [harmful]})
    if fault == "not finite":
        host.gradients = lambda loss, parameters: [torch.full_like(p, torch.nan) for p in parameters]
    report = CircuitBreaker(CircuitBreakerConfig(), model, seed=1).step(host, random_batch(), FIRST)
    assert report.idle
    assert all(gradient.isfinite().all() for gradient in learnt(model).values())


def test_the_adapter_is_on_and_learns_as_before_whatever_happens():
    model = with_lora(tiny_model("gpt2"))
    frozen = next(p for name, p in model.named_parameters() if "h.2" in name and "lora_A" in name)
    frozen.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ZeroDivisionError), adapter_off(model):
        raise ZeroDivisionError
    step(model)
    assert [p.requires_grad for p in model.parameters()] == flags
    with_adapter = model(**random_batch()).logits
    with adapter_off(model):
        assert not torch.allclose(model(**random_batch()).logits, with_adapter)


def test_it_works_with_checkpointed_layers():
    plain, checkpointed = with_lora(tiny_model()), with_lora(tiny_model())
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    step(plain)
    step(checkpointed)
    for name, gradient in learnt(plain).items():
        torch.testing.assert_close(learnt(checkpointed)[name], gradient)


def with_bias():
    model = with_lora(tiny_model("gpt2"))
    next(p for name, p in model.named_parameters() if name.endswith("ln_1.bias")).requires_grad_(True)
    return model


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (lambda: tiny_model("gpt2"), {}, "GPT2LMHeadModel has none. Set `adapter: lora`, or pass a model with a LoRA"),
        (with_bias, {}, r"h\.0\.ln_1\.bias learns outside the adapter.*Train the adapter alone"),
        (lambda: with_lora(tiny_model()), {"layers": [2, 5]}, "circuit_breaker.layers: 5 is more than the model's 4"),
        (
            lambda: new_adapter(target_modules=["c_attn"], layers_to_transform=[3], layers_pattern="h"),
            {},
            "behind layer 3, and nothing learns at or below it. Raise `circuit_breaker.depths`",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(model, settings, message):
    with pytest.raises(UserError, match=message):
        CircuitBreaker(CircuitBreakerConfig(**settings), model(), seed=1)


def test_layers_and_depths_together_are_refused():
    with pytest.raises(ValueError, match="circuit_breaker.layers: .*Remove one of them"):
        CircuitBreakerConfig(layers=[1], depths=[0.5])
