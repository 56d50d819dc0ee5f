"""CRL against the triplets of arXiv 2506.11938, written out."""

from __future__ import annotations

import pytest
import torch

from tests.defenses.test_circuit_breaker import BENIGN, FIRST, HARMFUL, learnt, new_adapter, precise_model
from tests.support.models import random_batch, tiny_model
from tests.support.straight_line import PlainAdapter
from tvac_plugin.boundary.errors import UserError
from tvac_plugin.configs.representations import CRLConfig
from tvac_plugin.defenses import CRL
from tvac_plugin.defenses.base import Position
from tvac_plugin.defenses.paired import centre
from tvac_plugin.defenses.testing import PlainHost


def step(model, *, position=FIRST, streams=None, **settings):
    host = PlainHost(model, streams or {"harmful": [HARMFUL], "benign": [BENIGN]})
    return CRL(CRLConfig(**settings), model, seed=1).step(host, random_batch(), position)


def tokens(mask):
    return mask.nonzero().tolist()


def distance(x, y):
    return 1 - x @ y / x.norm() / y.norm()


def mean(values):
    return sum(values) / len(values)


def straight_line(plain, benign, *, layers, benign_margin, harmful_margin, temperature):
    """L_b, L_h and K, token by token."""
    h_now, h_before = plain.states(plain.adapted(), HARMFUL), plain.states(plain.base, HARMFUL)
    b_now, b_before = plain.states(plain.adapted(), benign), plain.states(plain.base, benign)
    harmful_tokens, benign_tokens = tokens(HARMFUL["labels"] != -100), tokens(benign["labels"] != -100)
    kept, gathered = [], []
    for k in layers:
        c = mean([h_now[k][i, j] for i, j in harmful_tokens])
        for i, j in benign_tokens:
            b = b_now[k][i, j]
            kept.append(torch.relu(distance(b, b_before[k][i, j]) - distance(b, c) + benign_margin))
        for i, j in harmful_tokens:
            h = h_now[k][i, j]
            gathered.append(torch.relu(distance(h, c) - distance(h, h_before[k][i, j]) + harmful_margin))
    after = plain.plain.forward(plain.adapted(), benign["input_ids"])[0]
    before = plain.plain.forward(plain.base, benign["input_ids"])[0]
    kl = []
    for i, j in tokens(benign["attention_mask"]):
        p, q = (before[i, j] / temperature).softmax(-1), (after[i, j] / temperature).softmax(-1)
        kl.append((p * (p / q).log()).sum() * temperature**2)
    return mean(kept), mean(gathered), mean(kl)


@pytest.mark.parametrize("has_retain_data", [True, False])
def test_one_step_equals_the_paper(has_retain_data):
    # L = L(B) + 0.7 * relu(d(b', b) - d(b', c) + m_b) + 0.3 * relu(d(h', c) - d(h', h) + m_h) + 0.2 * T^2 * KL(p || p')
    model = precise_model()
    plain = PlainAdapter(model, num_layers=4, num_heads=2, lora_scale=2.0)
    benign = BENIGN if has_retain_data else random_batch()
    l_b, l_h, kl = straight_line(plain, benign, layers=[2, 3], benign_margin=0.1, harmful_margin=0.6, temperature=3.0)
    loss = plain.loss(random_batch()) + 0.7 * l_b + 0.3 * l_h + 0.2 * kl
    report = step(
        model, streams={"harmful": [HARMFUL]} | ({"benign": [BENIGN]} if has_retain_data else {}), layers=[2, 3],
        benign_scale=0.7, harmful_scale=0.3, kl_scale=0.2, benign_margin=0.1, harmful_margin=0.6, kl_temperature=3.0,
    )  # fmt: skip
    for name, gradient in plain.gradients(loss).items():
        torch.testing.assert_close(learnt(model)[name], gradient, rtol=1e-7, atol=1e-11, msg=name)
    for name, part in (("triplet_benign_loss", l_b), ("triplet_harmful_loss", l_h), ("kl_loss", kl)):
        assert part > 0
        assert report.losses[name].item() == pytest.approx(part.item(), rel=1e-9)


def test_layers_20_to_31_of_32_are_the_default():
    assert CRLConfig().layers_of(32) == list(range(20, 32))
    assert CRLConfig().layers_of(8) == [5, 6, 7]
    assert [CRLConfig().layers_of(n) for n in (1, 2, 4)] == [[1], [2], [3]]


def test_weights_of_zero_equal_sft():
    reference, model = precise_model(), precise_model()
    PlainHost(reference).train(random_batch())
    step(model, harmful_scale=0.0, benign_scale=0.0, kl_scale=0.0)
    for name, gradient in learnt(model).items():
        torch.testing.assert_close(gradient, learnt(reference)[name], rtol=1e-12, atol=1e-15)


def test_later_micro_batches_of_a_step_only_train():
    reference, model = precise_model(), precise_model()
    PlainHost(reference).train(random_batch())
    report = step(model, position=Position(step=0, starts_step=False))
    assert not report.norms
    assert all(torch.equal(gradient, learnt(reference)[name]) for name, gradient in learnt(model).items())


def test_a_new_adapter_starts_to_move():
    # d(h', h) is at its minimum at h' = h, but d(h', c) is not: harmful states are pulled together from the start
    model = new_adapter()
    report = step(model)
    assert report.losses["kl_loss"] == pytest.approx(0.0, abs=1e-6)
    assert report.losses["triplet_harmful_loss"] >= 0.5
    assert report.norms["regularizer_norm"] > 1e-3
    assert not report.idle
    assert all(gradient.isfinite().all() for gradient in learnt(model).values())


def test_the_centre_of_two_processes_is_that_of_one_with_all_rows():
    # c = (mean of S_p) / (mean of N_p); over its whole batch, one process has the gradient that two have on average
    torch.manual_seed(0)
    weight = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    rows, mask = torch.randn(1, 4, 5, 4, dtype=torch.float64), torch.rand(4, 5) < 0.6

    def loss_of(states, c):
        return (states - c).square().sum(-1).mean()

    states = rows @ weight
    c = centre(PlainHost(torch.nn.Module()), states, mask)
    expected = torch.autograd.grad(loss_of(states, c), weight)[0]
    leaf = c.detach().requires_grad_()
    by_centre = torch.autograd.grad(loss_of(states.detach(), leaf), leaf)[0]
    mean_count = (mask.sum() / 2).double()
    found = torch.zeros_like(expected)
    for part in (slice(0, 2), slice(2, 4)):
        host = PlainHost(torch.nn.Module())
        means = [c.detach() * mean_count, mean_count, by_centre / mean_count]  # of S_p, of N_p, of dL_p / dS
        host.mean_across_processes = lambda _, means=means: means.pop(0)
        mine = rows[:, part] @ weight
        found += torch.autograd.grad(loss_of(mine, centre(host, mine, mask[part])), weight)[0] / 2
        assert not means
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("moved", [True, False])
def test_only_harmful_states_that_are_where_they_should_be_leave_nothing_to_do(moved):
    model = precise_model()
    defense = CRL(CRLConfig(), model, seed=1)
    harmful_loss = torch.tensor(0.0 if moved else 0.7)
    none = {"labels": torch.full_like(HARMFUL["labels"], -100)}
    assert defense._effect(torch.tensor(0.0), harmful_loss, HARMFUL) == float(moved)
    assert defense._effect(torch.tensor(3.0), harmful_loss, none) == 0


def test_a_gradient_that_is_not_finite_is_idle():
    model = precise_model()
    host = PlainHost(model, {"harmful": [HARMFUL]})
    host.gradients = lambda loss, parameters: [torch.full_like(p, torch.nan) for p in parameters]
    report = CRL(CRLConfig(), model, seed=1).step(host, random_batch(), FIRST)
    assert report.idle
    assert all(gradient.isfinite().all() for gradient in learnt(model).values())


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(UserError, match="GPT2LMHeadModel has none. Set `adapter: lora`"):
        CRL(CRLConfig(), tiny_model("gpt2"), seed=1)
    with pytest.raises(ValueError, match="crl.layers: names the layers, and `depth_range` does too. Remove one"):
        CRLConfig(layers=[1], depth_range=(0.1, 0.2))
    with pytest.raises(ValueError, match="crl.depth_range: ends before it starts. Write the lower depth first"):
        CRLConfig(depth_range=(0.9, 0.2))
