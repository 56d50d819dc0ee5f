"""`relative_gradient_norm` and `rho_scale: relative`, against their formulas in float64 and under a change of scale."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.models import precise_gpt2, random_batch, tiny_model
from tests.support.straight_line import PlainGPT2, gradient
from tvac_plugin.args import defense_config
from tvac_plugin.boundary.errors import explain
from tvac_plugin.configs.perturbation import RandomNoiseConfig, TVaccineConfig, VaccineConfig
from tvac_plugin.defenses import build_defense
from tvac_plugin.defenses.base import Position
from tvac_plugin.defenses.budget import worst_perturbation
from tvac_plugin.defenses.testing import PlainHost

FIRST = Position(step=0, starts_step=True)
SCOPES = {"batch": (0, 1, 2), "sample": (1, 2)}


def step(config, model, batch, *, harmful=None):
    host = PlainHost(model, {"probe": [harmful or random_batch(seed=9)]})
    return build_defense(config, model, seed=1).step(host, batch, FIRST)


def padded_batch(**options) -> dict[str, Tensor]:
    """The last tokens of the second row are padding."""
    batch = random_batch(**options)
    batch["attention_mask"][1, -3:] = 0
    batch["labels"][1, -3:] = -100
    return batch


def outputs_and_gradients(plain: PlainGPT2, batch) -> tuple[list[Tensor], list[Tensor]]:
    """o_l without padding, and dL/do_l."""
    eps = [torch.zeros(*batch["input_ids"].shape, 16, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    gradients = torch.autograd.grad(plain.loss(plain.weights, batch, eps), eps)
    return [o.detach() * batch["attention_mask"].unsqueeze(-1) for o in plain.attended], list(gradients)


def test_relative_scores_are_gradient_norm_times_output_norm():
    # s_l = ||o_l|| * ||dL(w; B_h)/do_l||
    model, harmful = precise_gpt2(), padded_batch(seed=9)
    plain = PlainGPT2(model, num_layers=4, num_heads=2)
    config = TVaccineConfig(num_active_layers=2, layer_sampling="relative_gradient_norm", perturb="attention")
    probe = step(config, model, random_batch(), harmful=harmful).events[0]
    o, g = outputs_and_gradients(plain, harmful)
    expected = torch.stack([x.norm() * y.norm() for x, y in zip(o, g, strict=True)])
    torch.testing.assert_close(torch.tensor(probe["scores"]).double(), expected, rtol=1e-6, atol=0)
    shares = torch.tensor(probe["probabilities"]).double()
    torch.testing.assert_close(shares, expected / expected.sum(), rtol=1e-6, atol=0)
    assert expected.max() > 1.2 * expected.min(), "uniform scores would prove nothing"


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_one_relative_step_equals_the_formula(scope, share):
    # eps_l = rho * ||o_l||^2 * g_l / sqrt(sum over j of ||o_j||^2 * ||g_j||^2); gradient of L(w; o + eps)
    model, batch = precise_gpt2(), padded_batch()
    plain = PlainGPT2(model, num_layers=4, num_heads=2)
    config = VaccineConfig(rho=0.3, rho_scale="relative", rho_scope=scope, perturbed_share=share)
    report = step(config, model, batch)

    count = 3 if share == 1 else 2
    o, g = outputs_and_gradients(plain, {name: value[:count] for name, value in batch.items()})
    o2, g2 = ([x.pow(2).sum(SCOPES[scope], keepdim=True) for x in tensors] for tensors in (o, g))
    total = sum(a * b for a, b in zip(o2, g2, strict=True)).sqrt()
    eps = [0.3 * a * x / total for a, x in zip(o2, g, strict=True)]
    rest = torch.zeros(3 - count, *eps[0].shape[1:], dtype=torch.float64)
    expected = gradient(plain.loss(plain.weights, batch, [torch.cat([e, rest]) for e in eps]), plain.weights)

    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-8, atol=1e-12)
    budget = 0.3 if scope == "batch" else 0.3 * count**0.5
    assert report.norms["relative_perturbation_norm"].item() == pytest.approx(budget, rel=1e-10)
    length = sum(e.pow(2).sum() for e in eps).sqrt().item()
    assert report.norms["perturbation_norm"].item() == pytest.approx(length, rel=1e-10)
    assert not report.idle


@pytest.mark.parametrize("scope", SCOPES)
def test_relative_noise_has_the_share_rho_of_every_output(monkeypatch, scope):
    # eps_l = rho / sqrt(L) * ||o_l|| * z_l / ||z_l||; o_l with the noise below it
    model, batch, drawn, randn = precise_gpt2(), padded_batch(), [], torch.randn
    plain = PlainGPT2(model, num_layers=4, num_heads=2)
    monkeypatch.setattr(torch, "randn", lambda *a, **k: drawn.append(randn(*a, **k)) or drawn[-1])
    report = step(RandomNoiseConfig(rho=0.3, rho_scale="relative", rho_scope=scope), model, batch)
    eps = [torch.zeros_like(z) for z in drawn]
    for layer, z in enumerate(drawn):
        plain.forward(plain.weights, batch["input_ids"], eps)
        o = plain.attended[layer].detach() * batch["attention_mask"].unsqueeze(-1)
        length, of_z = (x.pow(2).sum(SCOPES[scope], keepdim=True).sqrt() for x in (o, z))
        eps[layer] = 0.15 * length * z / of_z
    expected = gradient(plain.loss(plain.weights, batch, eps), plain.weights)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-8, atol=1e-12)
    budget = 0.3 if scope == "batch" else 0.3 * 3**0.5
    assert report.norms["relative_perturbation_norm"].item() == pytest.approx(budget, rel=1e-10)


def random_tensors(seed: int) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {layer: torch.randn(3, 4, 5, generator=generator).double() * 10**layer for layer in range(3)}


def test_no_perturbation_within_the_relative_budget_raises_the_loss_more():
    g, o = random_tensors(0), random_tensors(1)
    squares = {layer: x.square().sum().view(1, 1, 1) for layer, x in o.items()}
    best = worst_perturbation(g, rho=0.5, rho_scope="batch", output_squares=squares)

    def rise(eps):
        return sum((g[layer] * eps[layer]).sum() for layer in g).item()

    def share(eps):
        return sum((eps[layer].norm() / o[layer].norm()) ** 2 for layer in g).sqrt()

    assert share(best).item() == pytest.approx(0.5, rel=1e-12)
    for seed in range(200):
        other = {layer: best[layer] + x * o[layer].norm() * 0.01 for layer, x in random_tensors(seed).items()}
        factor = 0.5 / share(other)
        assert rise({layer: x * factor for layer, x in other.items()}) < rise(best)


def test_with_outputs_of_one_norm_the_relative_budget_is_the_absolute_one():
    g = random_tensors(0)
    squares = {layer: torch.full((1, 1, 1), 16.0).double() for layer in g}
    relative = worst_perturbation(g, rho=0.5, rho_scope="batch", output_squares=squares)
    for layer, eps in worst_perturbation(g, rho=2.0, rho_scope="batch").items():
        torch.testing.assert_close(relative[layer], eps, rtol=1e-12, atol=0)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_outputs_without_a_finite_norm_give_no_perturbation(value):
    g = {0: torch.ones(2, 3, 4)}
    eps = worst_perturbation(g, rho=3.0, rho_scope="batch", output_squares={0: torch.full((1, 1, 1), value)})
    assert torch.equal(eps[0], torch.zeros(2, 3, 4))


def test_a_relative_perturbation_of_half_precision_does_not_overflow():
    g = {0: torch.full((2, 3, 4), 1e-4, dtype=torch.float16)}
    eps = worst_perturbation(g, rho=0.1, rho_scope="batch", output_squares={0: torch.full((1, 1, 1), 1e4)})
    assert torch.linalg.norm(eps[0].float()).item() == pytest.approx(10.0, rel=1e-3)


def test_a_share_that_bfloat16_rounds_away_is_measured_as_no_effect():
    config = VaccineConfig(rho=1e-7, rho_scale="relative")
    precise, rough = (step(config, model, random_batch()) for model in (tiny_model(), tiny_model().bfloat16()))
    assert not precise.idle
    assert rough.idle
    assert [norm.item() for norm in rough.norms.values()] == [0, 0]


def rescaled(factor: float):
    """A Gemma 2 whose attention output in layer 1 is `factor` times as large; the norm that reads it undoes that."""
    model = tiny_model("gemma2", rms_norm_eps=1e-12)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.mul_(factor)
    return model


def scores(model, sampling: str) -> Tensor:
    config = TVaccineConfig(num_active_layers=1, layer_sampling=sampling, rho=1.0)
    return torch.tensor(step(config, model, random_batch()).events[0]["scores"])


def test_an_equal_model_with_a_larger_output_has_the_same_relative_scores_and_other_ones_of_the_paper():
    before, after = rescaled(1.0), rescaled(8.0)
    batch = random_batch()
    torch.testing.assert_close(after(**batch).loss, before(**batch).loss, rtol=1e-5, atol=0)
    relative = [scores(model, "relative_gradient_norm") for model in (before, after)]
    torch.testing.assert_close(relative[1], relative[0], rtol=1e-4, atol=0)
    paper = [scores(model, "gradient_norm") for model in (before, after)]
    ratio = torch.ones(len(paper[0]))
    ratio[1] = 1 / 8
    torch.testing.assert_close(paper[1], paper[0] * ratio, rtol=1e-4, atol=0)


@pytest.mark.parametrize("config", [TVaccineConfig, VaccineConfig, RandomNoiseConfig])
def test_an_equal_model_with_a_larger_output_is_trained_the_same_by_a_relative_rho_alone(config):
    more = {"num_active_layers": 4, "layer_sampling": "uniform"} if config is TVaccineConfig else {}
    losses = {}
    for scale, rho in (("relative", 0.3), ("absolute", 3.0)):
        settings = config(rho=rho, rho_scale=scale, **more)
        losses[scale] = [step(settings, rescaled(factor), random_batch()).loss.item() for factor in (1.0, 8.0)]
    assert losses["relative"][1] == pytest.approx(losses["relative"][0], rel=1e-4)
    assert abs(losses["absolute"][1] / losses["absolute"][0] - 1) > 1e-3


@pytest.mark.parametrize("name", ["vaccine", "random_noise", "t_vaccine", "oasis"])
def test_a_relative_rho_must_be_given(name):
    recipe = {"safety_defense": name, "harmful_datasets": [{"path": "x.jsonl", "type": "alpaca"}]}
    with pytest.raises(ValueError, match="rho") as caught:
        defense_config(recipe | {name: {"rho_scale": "relative"}})
    said = explain(caught.value)[0]
    assert f"{name}.rho: has no default with `rho_scale: relative`" in said
    assert said.endswith(f"Add it, for example `{name}: {{rho_scale: relative, rho: 0.1}}`.")
    assert defense_config(recipe | {name: {"rho_scale": "relative", "rho": 0.1}}).rho == 0.1


def test_a_relative_rho_that_defends_nothing_is_refused_as_an_absolute_one():
    assert "nothing would be defended" in VaccineConfig(rho=1e-6, rho_scale="relative").effect_problems()[0]
