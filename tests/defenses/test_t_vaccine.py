"""T-Vaccine against arXiv 2410.09760, written out in `straight_line.py`."""

from __future__ import annotations

import contextlib

import pytest
import torch

from tests.support.hosts import WatchedHost
from tests.support.models import random_batch, tiny_model, with_lora
from tests.support.straight_line import PlainLlama
from tvac_plugin.configs.perturbation import TVaccineConfig, VaccineConfig
from tvac_plugin.defenses import TVaccine, Vaccine, step_kinds
from tvac_plugin.defenses.base import Position
from tvac_plugin.defenses.layer_draws import entropy, layer_probabilities

FIRST = Position(step=0, starts_step=True)


def lora_model(**overrides):
    return with_lora(tiny_model(**overrides))


def plain(model) -> PlainLlama:
    return PlainLlama(model, num_layers=4, num_heads=2, lora_scale=2.0)


def gradients(model) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("base_model.model."): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def step(defense, model, batch, *, harmful=(), position=FIRST):
    host = WatchedHost(model, {"probe": harmful or [random_batch(seed=9)]})
    return defense.step(host, batch, position), host


def test_probabilities_are_the_normalised_gradient_norms_on_harmful_data():
    # p_l = ||dL(w; B_h)/de_l|| / sum over j of ||dL(w; B_h)/de_j||
    model, harmful = lora_model(), random_batch(seed=9)
    report, _ = step(TVaccine(TVaccineConfig(num_active_layers=2), model, seed=1), model, random_batch())
    norms = torch.stack([g.norm() for g in plain(model).activation_gradients(harmful, [0, 1, 2, 3]).values()])
    expected = norms / norms.sum()
    probe = report.events[0]
    assert probe["event"] == "probe"
    torch.testing.assert_close(torch.tensor(probe["probabilities"]), expected.detach(), rtol=1e-5, atol=1e-6)
    assert expected.max() > 1.2 * expected.min(), "uniform scores would prove nothing"


@pytest.mark.parametrize("rho_scope", ["batch", "sample"])
def test_one_step_equals_the_paper(rho_scope):
    # eps_l = rho * g_l / sqrt(sum over j in S of ||g_j||^2); gradient of L(w; e + eps) for w in S
    model, batch = lora_model(), random_batch()
    config = TVaccineConfig(rho=1.5, num_active_layers=2, rho_scope=rho_scope)
    report, _ = step(TVaccine(config, model, seed=1), model, batch)
    drawn = list(report.active_layers)

    paper = plain(model)
    g = paper.activation_gradients(batch, drawn)
    dims = (1, 2) if rho_scope == "sample" else (0, 1, 2)
    norm = sum(x.square().sum(dims, keepdim=True) for x in g.values()).sqrt()
    eps = {layer: 1.5 * x / norm for layer, x in g.items()}
    loss = paper.loss(batch, eps)
    loss.backward()

    torch.testing.assert_close(report.loss, loss.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(report.losses["clean_loss"], paper.loss(batch, {}).detach(), rtol=1e-5, atol=1e-6)
    budget = 1.5 if rho_scope == "batch" else 1.5 * 3**0.5
    assert report.norms["perturbation_norm"].item() == pytest.approx(budget, rel=1e-5)
    ours = gradients(model)
    assert {name.split(".")[2] for name in ours} == {str(layer) for layer in drawn}
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, paper.adapters[name].grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_a_share_of_the_rows_is_perturbed_by_the_gradient_of_these_rows_alone(share):
    # eps = rho * g / ||g|| with g from the first rows; the loss of all rows trains
    model, batch = lora_model(), random_batch()
    defense = TVaccine(TVaccineConfig(rho=1.5, num_active_layers=2, perturbed_share=share), model, seed=1)
    report, _ = step(defense, model, batch)
    drawn, count = list(report.active_layers), {0.5: 2, 0.2: 1}[share]

    paper = plain(model)
    g = paper.activation_gradients({name: value[:count] for name, value in batch.items()}, drawn)
    norm = sum(x.square().sum() for x in g.values()).sqrt()
    zeros = torch.zeros(3 - count, *g[drawn[0]].shape[1:])
    loss = paper.loss(batch, {layer: torch.cat([1.5 * x / norm, zeros]) for layer, x in g.items()})
    loss.backward()

    torch.testing.assert_close(report.loss, loss.detach(), rtol=1e-5, atol=1e-6)
    assert report.norms["perturbation_norm"].item() == pytest.approx(1.5, rel=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, paper.adapters[name].grad, rtol=1e-5, atol=1e-5)


def test_freeze_attention_trains_what_the_published_code_trains():
    # attention adapters of drawn layers, MLP adapters from the lowest drawn layer up
    model = lora_model()
    defense = TVaccine(TVaccineConfig(num_active_layers=2, freeze="attention"), model, seed=1)
    defense.load_state_dict({"num_probes": 1, "probabilities": [0.25] * 4, "active_layers": [1, 3]})
    step(defense, model, random_batch(), position=Position(step=1, starts_step=False))
    trained = {(int(name.split(".")[2]), name.split(".")[3]) for name in gradients(model)}
    assert trained == {(1, "self_attn"), (3, "self_attn"), (1, "mlp"), (2, "mlp"), (3, "mlp")}


@pytest.mark.parametrize(
    ("num_layers", "drawn", "lowest"), [(26, [7, 14], 7), (27, [7, 14], 6), (28, [7, 14], 6), (28, [0, 14], 0)]
)
def test_freeze_attention_reaches_a_layer_lower_in_deep_models_as_the_published_code_does(num_layers, drawn, lowest):
    # published code: with more than 26 layers the one below each drawn layer is not checkpointed, so its MLP learns
    model = lora_model(num_hidden_layers=num_layers)
    defense = TVaccine(TVaccineConfig(num_active_layers=2, freeze="attention"), model, seed=1)
    share = [1 / num_layers] * num_layers
    defense.load_state_dict({"num_probes": 1, "probabilities": share, "active_layers": drawn})
    step(defense, model, random_batch(), position=Position(step=1, starts_step=False))
    trained = {(int(name.split(".")[2]), name.split(".")[3]) for name in gradients(model)}
    assert trained == {(i, "self_attn") for i in drawn} | {(i, "mlp") for i in range(lowest, num_layers)}


def test_freeze_none_trains_everything():
    model = lora_model()
    step(TVaccine(TVaccineConfig(num_active_layers=1, freeze="none"), model, seed=1), model, random_batch())
    assert len(gradients(model)) == sum(p.requires_grad for p in model.parameters())


def test_full_fine_tuning_trains_drawn_layers_and_nothing_outside_the_blocks():
    model = tiny_model()
    report, _ = step(TVaccine(TVaccineConfig(num_active_layers=2), model, seed=1), model, random_batch())
    assert {name.split(".")[2] for name in gradients(model)} == {str(layer) for layer in report.active_layers}


def test_rho_to_zero_with_every_layer_equals_sft():
    reference, batch = lora_model(), random_batch()
    reference(**batch).loss.backward()
    model = lora_model()
    step(TVaccine(TVaccineConfig(rho=1e-9, num_active_layers=4), model, seed=1), model, batch)
    for name, gradient in gradients(reference).items():
        torch.testing.assert_close(gradients(model)[name], gradient, rtol=1e-5, atol=1e-7)


def test_all_layers_without_freezing_equals_vaccine():
    batch, ours, theirs = random_batch(), lora_model(), lora_model()
    config = TVaccineConfig(rho=2.0, num_active_layers=4, freeze="none")
    report, _ = step(TVaccine(config, ours, seed=1), ours, batch)
    vaccine, host = step(Vaccine(VaccineConfig(rho=2.0), theirs, seed=1), theirs, batch)
    assert torch.equal(report.loss, vaccine.loss)
    assert host.passes == ["loss", "train"]
    for name, gradient in gradients(theirs).items():
        assert torch.equal(gradients(ours)[name], gradient)


@pytest.mark.parametrize("site", ["mlp", "layer"])
def test_perturbation_lands_at_the_chosen_site(site):
    model, batch, seen = lora_model(), random_batch(), {}
    block = model.base_model.model.model.layers[0]
    target = {"mlp": block.mlp, "layer": block}[site]
    config = TVaccineConfig(rho=2.0, num_active_layers=4, perturb=site)
    defense = TVaccine(config, model, seed=1)

    class Recorder(WatchedHost):
        def loss(self, batch, *, of=None):
            with recording("clean"):
                return super().loss(batch)

        def train(self, batch):
            with recording("perturbed"):
                return super().train(batch)

    @contextlib.contextmanager
    def recording(name):
        def hook(_module, _inputs, output):
            seen[name] = (output[0] if isinstance(output, tuple) else output).detach()

        handle = target.register_forward_hook(hook)
        yield
        handle.remove()

    report = defense.step(Recorder(model, {"probe": [random_batch(seed=9)]}), batch, FIRST)
    moved = (seen["perturbed"] - seen["clean"]).norm().item()
    assert 0 < moved < 2.0
    assert report.norms["perturbation_norm"].item() == pytest.approx(2.0, rel=1e-5)


def test_pass_one_leaves_accumulated_gradients_alone():
    model, batch = lora_model(), random_batch()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None

    class StopBeforePassTwo(WatchedHost):
        def train(self, batch):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TVaccine(TVaccineConfig(num_active_layers=2), model, seed=1).step(
            StopBeforePassTwo(model, {"probe": [random_batch(seed=9)]}), batch, FIRST
        )
    assert all((p.grad == 1).all() for p in model.parameters() if p.requires_grad)


def test_accumulated_gradients_are_the_sum_of_the_micro_batches():
    first, second = random_batch(seed=1), random_batch(seed=2)
    separate = []
    for batch in (first, second):
        model = lora_model()
        step(TVaccine(TVaccineConfig(num_active_layers=2), model, seed=1), model, batch)
        separate.append(gradients(model))
    model = lora_model()
    defense = TVaccine(TVaccineConfig(num_active_layers=2), model, seed=1)
    step(defense, model, first)
    report, host = step(defense, model, second, position=Position(step=0, starts_step=False))
    assert report.events == []
    assert host.passes == ["loss", "train"]
    assert gradients(model).keys() == separate[0].keys()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, separate[0][name] + separate[1][name])


@pytest.mark.parametrize("failing_pass", ["mean_loss", "loss", "train"])
def test_a_step_that_raises_leaves_no_hook_and_no_frozen_parameter(failing_pass):
    model = lora_model()
    before = [p.requires_grad for p in model.parameters()]
    hooks_before = sum(len(m._forward_hooks) for m in model.modules())

    class Failing(WatchedHost):
        pass

    def fail(self, batch, **_):
        self.model(**batch)
        raise MemoryError(failing_pass)

    setattr(Failing, failing_pass, fail)
    with pytest.raises(MemoryError):
        TVaccine(TVaccineConfig(num_active_layers=2), model, seed=1).step(
            Failing(model, {"probe": [random_batch(seed=9)]}), random_batch(), FIRST
        )
    assert [p.requires_grad for p in model.parameters()] == before
    assert sum(len(m._forward_hooks) for m in model.modules()) == hooks_before


def test_dropout_masks_are_the_same_in_both_passes_and_the_stream_is_sft_s():
    batch = random_batch()
    model = with_lora(tiny_model(), dropout=0.5)
    defense = TVaccine(TVaccineConfig(rho=1e-9, num_active_layers=4), model, seed=1)
    torch.manual_seed(5)
    report, _ = step(defense, model, batch)
    after = torch.rand(1)
    assert report.loss.item() == pytest.approx(report.losses["clean_loss"].item(), rel=1e-6)
    torch.manual_seed(5)
    assert model(**batch).loss.item() == pytest.approx(report.loss.item(), rel=1e-6)
    assert torch.equal(torch.rand(1), after)


def test_probes_and_draws_happen_when_they_are_due_and_once_per_optimizer_step():
    model = lora_model()
    config = TVaccineConfig(num_active_layers=1, probe_steps=4, resample_steps=2)
    defense, happened = TVaccine(config, model, seed=1), []
    for number in range(6):
        for starts_step in (True, False):
            report, _ = step(defense, model, random_batch(), position=Position(number, starts_step))
            happened += [(number, event["event"]) for event in report.events]
    assert happened == [(0, "probe"), (0, "draw"), (2, "draw"), (4, "probe"), (4, "draw")]


def test_draws_follow_the_probabilities_without_replacement():
    model = lora_model()
    defense = TVaccine(TVaccineConfig(num_active_layers=2, resample_steps=1), model, seed=1)
    probabilities = torch.tensor([0.7, 0.1, 0.1, 0.1]).double()
    defense.load_state_dict({"num_probes": 1, "probabilities": probabilities.tolist(), "active_layers": [0]})
    counts = torch.zeros(4)
    for number in range(1, 3001):
        layers = defense._draw(number)["layers"]
        assert len(set(layers)) == 2
        counts[layers] += 1
    # inclusion of layer l: p_l + sum over j of p_j * p_l / (1 - p_j), j the layer drawn first
    odds = probabilities / (1 - probabilities)
    inclusion = probabilities * (1 + odds.sum() - odds)
    torch.testing.assert_close(counts / 3000, inclusion.float(), atol=0.03, rtol=0)


def test_top_k_takes_the_highest_scores():
    model = lora_model()
    defense = TVaccine(TVaccineConfig(num_active_layers=2, layer_sampling="top_k"), model, seed=1)
    report, _ = step(defense, model, random_batch())
    scores = torch.tensor(report.events[0]["scores"])
    assert set(report.active_layers) == set(scores.topk(2).indices.tolist())


@pytest.mark.parametrize("poison", [0.0, float("nan")])
def test_a_probe_that_says_nothing_is_warned_of(monkeypatch, caplog, poison):
    model = lora_model()
    defense = TVaccine(TVaccineConfig(num_active_layers=2), model, seed=1)
    monkeypatch.setattr("tvac_plugin.defenses.layer_probe.norm", lambda tensors: tensors[0].sum() * 0 + poison)
    report, _ = step(defense, model, random_batch())
    assert report.events[0]["probabilities"] == [0.25] * 4
    assert "probe 1: its scores are zero or not finite, so layers are drawn uniformly" in caplog.text


def test_uniform_sampling_never_probes():
    model = lora_model()
    defense = TVaccine(TVaccineConfig(num_active_layers=2, layer_sampling="uniform"), model, seed=1)
    _, host = step(defense, model, random_batch())
    assert host.passes == ["loss", "train"]


def test_zero_scores_fall_back_to_uniform():
    assert layer_probabilities(torch.zeros(4)).tolist() == [0.25] * 4
    assert layer_probabilities(torch.tensor([1.0, float("nan")])).tolist() == [0.5, 0.5]
    assert entropy(torch.full((4,), 0.25)) == pytest.approx(1.3862944)


def test_state_restores_the_next_step():
    model, batch = lora_model(), random_batch()
    config = TVaccineConfig(num_active_layers=2, probe_steps=3, resample_steps=2)
    whole, resumed = (TVaccine(config, model, seed=1) for _ in range(2))
    harmful = [random_batch(seed=s) for s in range(5)]
    for number in range(3):
        step(whole, model, batch, harmful=harmful, position=Position(number, True))
    resumed.load_state_dict(whole.state_dict())
    for number in range(3, 8):
        expected, _ = step(whole, model, batch, harmful=harmful, position=Position(number, True))
        report, _ = step(resumed, model, batch, harmful=harmful, position=Position(number, True))
        assert (report.active_layers, report.events) == (expected.active_layers, expected.events)


def test_more_layers_than_the_model_has_are_refused():
    with pytest.raises(ValueError, match=r"num_active_layers: 5 is more than the model's 4 layers. Set it to 4"):
        TVaccine(TVaccineConfig(num_active_layers=5), lora_model(), seed=1)


def test_a_perturbation_that_never_arrives_is_an_error():
    model = lora_model()
    defense = TVaccine(TVaccineConfig(num_active_layers=4, layer_sampling="uniform"), model, seed=1)

    class Bypassing(WatchedHost):
        def train(self, batch):
            return torch.zeros(())

    with pytest.raises(RuntimeError, match=r"never reached layers \[0, 1, 2, 3\]"):
        defense.step(Bypassing(model), random_batch(), FIRST)


@pytest.mark.parametrize("sampling", ["uniform", "gradient_norm"])
@pytest.mark.parametrize("num_drawn", [1, 2, 4])
def test_the_kinds_of_its_steps_are_all_steps(sampling, num_drawn):
    config = TVaccineConfig(num_active_layers=num_drawn, layer_sampling=sampling, probe_steps=5)
    kinds = step_kinds(config, 4, accumulation=2)
    assert sum(kind.share for kind in kinds) == pytest.approx(1.0)
    lowest = [min(kind.state["active_layers"]) for kind in kinds if kind.place is not None]
    assert lowest == [kind.place for kind in kinds if kind.place is not None] == list(range(5 - num_drawn))
    for kind in kinds:
        model = lora_model()
        defense = TVaccine(kind.config, model, seed=1)
        defense.load_state_dict(kind.state)
        report, _ = step(defense, model, random_batch(), position=kind.position)
        assert list(report.active_layers) == kind.state["active_layers"]
        assert [event["event"] for event in report.events] == (["probe"] if kind.place is None else [])
