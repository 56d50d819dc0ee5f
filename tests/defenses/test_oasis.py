"""OASIS against the equations of its published code, written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.hosts import WatchedHost
from tests.support.models import precise_gpt2, random_batch, tiny_model, with_lora
from tests.support.straight_line import PlainGPT2, gradient
from tvac_plugin.configs.perturbation import OASISConfig, TVaccineConfig, VaccineConfig
from tvac_plugin.defenses import OASIS, TVaccine, Vaccine, step_kinds
from tvac_plugin.defenses.base import Position
from tvac_plugin.defenses.oasis import orthogonal_part
from tvac_plugin.model.architecture import find_blocks

FIRST = Position(step=0, starts_step=True)
LATER = Position(step=1, starts_step=False)
SCOPES = {"batch": (0, 1, 2), "sample": (1, 2)}
TWO = {"num_active_layers": 2}


def padded_batch(**options) -> dict[str, Tensor]:
    """The last tokens of the second row are padding."""
    batch = random_batch(**options)
    batch["attention_mask"][1, -3:] = 0
    batch["labels"][1, -3:] = -100
    return batch


def step(model, batch, *, defense=None, harmful=None, position=FIRST, **settings):
    defense = defense or OASIS(OASISConfig(**settings), model, seed=1)
    return defense.step(WatchedHost(model, {"probe": [harmful or padded_batch(seed=9)]}), batch, position)


def gradients(model) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def in_layers(name: str, layers) -> bool:
    return any(f".{layer}." in name for layer in layers)


def lora_model(**options):
    return with_lora(tiny_model(**options))


def at_outputs(plain: PlainGPT2, batch) -> list[Tensor]:
    """dL/de_l for every layer."""
    eps = [torch.zeros(*batch["input_ids"].shape, 16, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    return list(torch.autograd.grad(plain.loss(plain.weights, batch, eps), eps))


def without(x: Tensor, m: Tensor) -> Tensor:
    """x - <x, m> / ||m||^2 * m at every token."""
    return x - (x @ m)[..., None] / (m @ m) * m


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("renormalise", [False, True])
def test_one_step_equals_the_published_equations(renormalise, scope):
    model, batch, harmful = precise_gpt2(), padded_batch(), padded_batch(seed=9)
    plain = PlainGPT2(model, num_layers=4, num_heads=2)
    report = step(model, batch, rho=1.5, rho_scope=scope, renormalise=renormalise, **TWO)

    # S = the layers of largest ||d_l||, m_l = mean of d_l over the tokens that are no padding
    d = at_outputs(plain, harmful)
    norms = torch.stack([x.norm() for x in d])
    chosen = sorted(norms.topk(2).indices.tolist())
    m = {layer: d[layer][harmful["attention_mask"] == 1].mean(0) for layer in chosen}
    # eps_l = rho * g_l / ||g_S||, without its part along m_l; or the same with g_l without its part along m_l
    g = {layer: at_outputs(plain, batch)[layer] for layer in chosen}
    g_used = {layer: without(x, m[layer]) for layer, x in g.items()} if renormalise else g
    total = sum(x.square().sum(SCOPES[scope], keepdim=True) for x in g_used.values()).sqrt()
    eps = {layer: without(1.5 * x / total, m[layer]) for layer, x in g_used.items()}
    loss = plain.loss(plain.weights, batch, [eps.get(layer, torch.zeros_like(d[0])) for layer in range(4)])
    expected = gradient(loss, plain.weights)

    assert [event["event"] for event in report.events] == ["probe", "draw"]
    assert list(report.active_layers) == report.events[1]["layers"] == chosen
    torch.testing.assert_close(torch.tensor(report.events[0]["scores"]).double(), norms, rtol=1e-6, atol=0)
    torch.testing.assert_close(report.loss, loss.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(report.losses["clean_loss"], plain.loss(plain.weights, batch).detach())
    length = sum(x.square().sum() for x in eps.values()).sqrt().item()
    assert report.norms["perturbation_norm"].item() == pytest.approx(length, rel=1e-10)
    assert len(gradients(model)) == sum(in_layers(name, chosen) for name in plain.weights)
    for name, found in gradients(model).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-8, atol=1e-12, msg=name)


@pytest.mark.parametrize("scope", SCOPES)
def test_renormalised_it_has_the_norm_rho_and_else_less(scope):
    budget = 2.0 if scope == "batch" else 2.0 * 3**0.5
    for renormalise, is_whole in ((True, True), (False, False)):
        report = step(precise_gpt2(), random_batch(), rho=2.0, rho_scope=scope, renormalise=renormalise, **TWO)
        length = report.norms["perturbation_norm"].item()
        assert (length == pytest.approx(budget, rel=1e-10)) == is_whole
        assert 0.5 * budget < length < budget * (1 + 1e-10)


@pytest.mark.parametrize("renormalise", [False, True])
def test_a_relative_budget_is_spent_and_then_reduced(renormalise):
    settings = {"rho": 0.3, "rho_scale": "relative", "renormalise": renormalise, **TWO}
    report = step(precise_gpt2(), padded_batch(), **settings)
    share = report.norms["relative_perturbation_norm"].item()
    assert share == pytest.approx(0.3, rel=1e-10) if renormalise else 0 < share < 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_is_left_is_orthogonal_and_nothing_is_left_of_the_direction_itself(dtype):
    generator = torch.Generator().manual_seed(0)
    m = torch.randn(1024, generator=generator).to(dtype).to(torch.float64)
    unit = (m / m.norm()).to(torch.float64 if dtype == torch.float64 else torch.float32)
    x = torch.randn(3, 5, 1024, generator=generator).to(dtype)
    left = orthogonal_part(x, unit)
    assert left.dtype == dtype
    along = (left.double() @ unit.double()).abs()
    assert (along < 8 * torch.finfo(dtype).eps * x.double().norm(dim=-1)).all()
    torch.testing.assert_close(left, without(x.double(), m).to(dtype))
    for factor in (1.0, -0.5, 2.0**-30):
        assert (orthogonal_part((factor * m).to(dtype).expand(2, 3, -1), unit) == 0).all()
    assert torch.equal(orthogonal_part(x, torch.zeros(1024)), x), "no direction, nothing to leave out"


def test_only_the_direction_of_the_harmful_mean_counts_so_padding_does_not():
    # a mean over padded positions, where d_l is 0, is shorter and points the same way
    longer = padded_batch(seed=9)
    longer = {
        name: torch.nn.functional.pad(value, (0, 4), value=-100 if name == "labels" else 0)
        for name, value in longer.items()
    }
    one, other = (step(precise_gpt2(), random_batch(), harmful=h, **TWO) for h in (padded_batch(seed=9), longer))
    assert other.loss.item() == pytest.approx(one.loss.item(), rel=1e-12)
    assert other.active_layers == one.active_layers


def one_answer_token() -> dict[str, Tensor]:
    """One row whose loss depends on the outputs of one position alone, so that every g_l is a single vector."""
    return random_batch(rows=1, length=2, prompt=1)


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("model", [precise_gpt2, lambda: tiny_model("gpt2"), lambda: tiny_model("gpt2").bfloat16()])
def test_a_perturbation_of_which_nothing_remains_is_measured_as_no_effect(renormalise, model):
    # g_l = d_l is one vector, so m_l is along it and all of eps_l is taken away
    model, reference = model(), model()
    report = step(model, one_answer_token(), harmful=one_answer_token(), renormalise=renormalise, **TWO)
    assert report.norms["perturbation_norm"].item() == 0
    assert report.idle
    assert torch.equal(report.loss, report.losses["clean_loss"])
    WatchedHost(reference).train(one_answer_token())
    for name, found in gradients(model).items():
        assert torch.equal(found, gradients(reference)[name]), name


@pytest.mark.parametrize("renormalise", [False, True])
def test_what_remains_in_one_layer_alone_is_an_effect(renormalise):
    model = precise_gpt2()
    defense = OASIS(OASISConfig(renormalise=renormalise, **TWO), model, seed=1)
    step(model, one_answer_token(), defense=defense, harmful=one_answer_token())
    state = defense.state_dict()
    state["directions"][1] = 0
    defense.load_state_dict(state)
    report = step(model, one_answer_token(), defense=defense, position=LATER)
    assert report.norms["perturbation_norm"] > 0
    assert not report.idle


def test_without_directions_all_layers_are_vaccine_bit_for_bit():
    ours, theirs = lora_model(), lora_model()
    defense = OASIS(OASISConfig(rho=2.0, num_active_layers=4), ours, seed=1)
    defense.load_state_dict(OASIS.state_with(range(4)))
    report = step(ours, random_batch(), defense=defense, position=LATER)
    vaccine = Vaccine(VaccineConfig(rho=2.0), theirs, seed=1).step(WatchedHost(theirs), random_batch(), FIRST)
    assert torch.equal(report.loss, vaccine.loss)
    assert gradients(ours).keys() == gradients(theirs).keys()
    assert all(torch.equal(gradients(ours)[name], g) for name, g in gradients(theirs).items())


def test_without_directions_it_is_t_vaccine_with_the_highest_scores_bit_for_bit():
    ours, theirs = lora_model(), lora_model()
    defense = OASIS(OASISConfig(rho=2.0, **TWO), ours, seed=1)
    probed = step(ours, random_batch(), defense=defense)
    defense.load_state_dict(OASIS.state_with(probed.active_layers))
    ours.zero_grad(set_to_none=True)
    report = step(ours, random_batch(), defense=defense, position=LATER)
    config = TVaccineConfig(rho=2.0, layer_sampling="top_k", **TWO)
    expected = step(theirs, random_batch(), defense=TVaccine(config, theirs, seed=1))
    assert report.active_layers == expected.active_layers
    assert torch.equal(report.loss, expected.loss)
    assert gradients(ours).keys() == gradients(theirs).keys()
    assert all(torch.equal(gradients(ours)[name], g) for name, g in gradients(theirs).items())


def test_rho_to_zero_equals_sft_of_the_chosen_layers():
    reference, model = lora_model(), lora_model()
    WatchedHost(reference).train(random_batch())
    chosen = step(model, random_batch(), rho=1e-9, **TWO).active_layers
    found, expected = gradients(model), gradients(reference)
    assert found.keys() == {name for name in expected if in_layers(name, chosen)}
    for name, each in found.items():
        torch.testing.assert_close(each, expected[name], rtol=1e-5, atol=1e-7)


def test_frozen_layers_have_no_gradient_so_no_optimizer_moves_them():
    # the published code sets these gradients to zero, and momentum and weight decay then move the weights
    model = lora_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    WatchedHost(model).train(random_batch())
    optimizer.step()
    optimizer.zero_grad()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    chosen = step(model, random_batch(), **TWO).active_layers
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad and in_layers(name, chosen)}


def test_accumulated_gradients_are_the_sum_of_the_micro_batches():
    first, second, separate = random_batch(seed=1), random_batch(seed=2), []
    for batch in (first, second):
        model = lora_model()
        step(model, batch, **TWO)
        separate.append(gradients(model))
    model = lora_model()
    defense = OASIS(OASISConfig(**TWO), model, seed=1)
    step(model, first, defense=defense)
    report = step(model, second, defense=defense, position=Position(step=0, starts_step=False))
    assert report.events == []
    for name, found in gradients(model).items():
        torch.testing.assert_close(found, separate[0][name] + separate[1][name])


def test_probes_happen_when_they_are_due_and_once_per_optimizer_step():
    model, happened = lora_model(), []
    defense = OASIS(OASISConfig(probe_steps=3, **TWO), model, seed=1)
    for number in range(7):
        for starts_step in (True, False):
            report = step(model, random_batch(), defense=defense, position=Position(number, starts_step))
            happened += [(number, event["event"]) for event in report.events]
    assert happened == [(n, kind) for n in (0, 3, 6) for kind in ("probe", "draw")]


def test_both_passes_see_the_same_dropout_masks():
    model = with_lora(tiny_model(), dropout=0.5)
    report = step(model, random_batch(), rho=1e-9, **TWO)
    assert report.loss.item() == pytest.approx(report.losses["clean_loss"].item(), rel=1e-6)


@pytest.mark.parametrize("poison", [0.0, float("nan")])
def test_before_a_probe_that_says_something_nothing_is_defended_and_nothing_claims_to_be(monkeypatch, caplog, poison):
    model, reference = lora_model(), lora_model()
    defense = OASIS(OASISConfig(**TWO), model, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr("tvac_plugin.defenses.layer_probe.norm", lambda tensors: tensors[0].sum() * 0 + poison)
        report = step(model, random_batch(), defense=defense)
        WatchedHost(reference).train(random_batch())
        assert all(torch.equal(gradients(model)[name], g) for name, g in gradients(reference).items())
        assert report.idle
        assert report.active_layers == ()
        assert [event["event"] for event in report.events] == ["probe"]
        assert "probe 1: its scores are zero or not finite. Layers and directions stay" in caplog.text
    again = step(model, random_batch(), defense=defense, position=Position(1, starts_step=True))
    assert [event["event"] for event in again.events] == ["probe", "draw"], "the next step tries again"
    assert not again.idle


def test_a_later_probe_that_says_nothing_leaves_layers_and_directions(monkeypatch):
    model = lora_model()
    defense = OASIS(OASISConfig(probe_steps=1, **TWO), model, seed=1)
    first = step(model, random_batch(), defense=defense)
    monkeypatch.setattr("tvac_plugin.defenses.layer_probe.norm", lambda tensors: tensors[0].sum() * torch.nan)
    report = step(model, random_batch(), defense=defense, position=Position(1, starts_step=True))
    assert report.active_layers == first.active_layers
    assert torch.equal(report.loss, first.loss)


def test_state_restores_the_next_step():
    model = lora_model()
    config = OASISConfig(probe_steps=3, **TWO)
    whole, resumed = (OASIS(config, model, seed=1) for _ in range(2))
    for number in range(2):
        step(model, random_batch(), defense=whole, position=Position(number, True))
    resumed.load_state_dict(whole.state_dict())
    for number in range(2, 8):
        expected, report = (
            step(model, random_batch(), defense=each, position=Position(number, True)) for each in (whole, resumed)
        )
        assert (report.active_layers, report.events) == (expected.active_layers, expected.events)
        assert torch.equal(report.loss, expected.loss)


def test_a_defense_that_never_probed_has_a_state_too():
    model = lora_model()
    state = OASIS(OASISConfig(**TWO), model, seed=1).state_dict()
    resumed = OASIS(OASISConfig(**TWO), model, seed=1)
    resumed.load_state_dict(state)
    assert step(model, random_batch(), defense=resumed).events


@pytest.mark.parametrize("failing_pass", ["mean_loss", "loss", "train"])
def test_a_step_that_raises_leaves_no_hook_and_no_frozen_parameter(failing_pass):
    model = lora_model()
    before = [p.requires_grad for p in model.parameters()]

    class Failing(WatchedHost):
        pass

    def fail(self, batch, **_):
        self.model(**batch)
        raise MemoryError(failing_pass)

    setattr(Failing, failing_pass, fail)
    defense, host = OASIS(OASISConfig(**TWO), model, seed=1), Failing(model, {"probe": [random_batch(seed=9)]})
    with pytest.raises(MemoryError):
        defense.step(host, random_batch(), FIRST)
    assert [p.requires_grad for p in model.parameters()] == before
    assert not any(module._forward_hooks for block in find_blocks(model) for module in block.layer.modules())


def test_what_the_model_cannot_do_is_refused():
    with pytest.raises(ValueError, match=r"oasis.num_active_layers: 20 is more than the model's 4 layers. Set it to 4"):
        OASIS(OASISConfig(), lora_model(), seed=1)
    model = lora_model()
    for parameter in find_blocks(model)[2].layer.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match=r"oasis: nothing learns in layers 2, .*Train something in every layer"):
        OASIS(OASISConfig(**TWO), model, seed=1)


def test_a_perturbation_that_never_arrives_is_an_error():
    class Bypassing(WatchedHost):
        def train(self, batch):
            return torch.zeros(())

    model = lora_model()
    defense, host = OASIS(OASISConfig(**TWO), model, seed=1), Bypassing(model, {"probe": [random_batch(seed=9)]})
    with pytest.raises(RuntimeError, match=r"never reached layers \[\d, \d\]"):
        defense.step(host, random_batch(), FIRST)


@pytest.mark.parametrize("num_chosen", [1, 2, 4])
def test_the_kinds_of_its_steps_are_all_steps(num_chosen):
    config = OASISConfig(num_active_layers=num_chosen, probe_steps=5)
    kinds = step_kinds(config, 4, accumulation=2)
    assert sum(kind.share for kind in kinds) == pytest.approx(1.0)
    assert kinds[-1].share == pytest.approx(0.1)
    assert [kind.place for kind in kinds[:-1]] == list(range(5 - num_chosen))
    for kind in kinds:
        model = lora_model()
        defense = OASIS(kind.config, model, seed=1)
        defense.load_state_dict(kind.state)
        report = step(model, random_batch(), defense=defense, position=kind.position)
        assert [event["event"] for event in report.events] == (["probe", "draw"] if kind.place is None else [])
        if kind.place is not None:
            assert list(report.active_layers) == kind.state["active_layers"]


def test_known_probes_leave_the_choices_that_they_make():
    probes = [[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]]
    kinds = step_kinds(OASISConfig(probe_steps=10, **TWO), 4, accumulation=1, probes=probes)
    assert {kind.place: kind.share for kind in kinds} == {0: pytest.approx(0.4), 2: 0.5, None: pytest.approx(0.1)}
