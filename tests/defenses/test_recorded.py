"""Steps of 28 layers against numbers that the authors' own code gave; `recorded.json` says how they were made."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.support.deep_model import (
    NUM_LAYERS,
    deep_checkpoint,
    deep_model,
    digest,
    formula_batch,
    formula_noise,
    formula_pair,
)
from tests.support.hosts import WatchedHost
from tvac_plugin.configs.collapse import SEAMConfig
from tvac_plugin.configs.fine_tuning import LisaConfig
from tvac_plugin.configs.perturbation import OASISConfig, TVaccineConfig, VaccineConfig
from tvac_plugin.configs.representations import CircuitBreakerConfig, CRLConfig
from tvac_plugin.configs.unlearning import BoosterConfig, RepNoiseConfig, TARConfig
from tvac_plugin.defenses import CRL, OASIS, SEAM, TAR, Booster, CircuitBreaker, Lisa, RepNoise, TVaccine, Vaccine
from tvac_plugin.defenses.base import Position
from tvac_plugin.lox import apply_lox

RECORDED = json.loads(Path(__file__).with_name("recorded.json").read_text())


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def changes(before, after):
    """Of the tensors that changed, by how much."""
    return {name: after[name].double() - old.double() for name, old in before.items() if not after[name].equal(old)}


def assert_digest(found, expected):
    """Norms within 1e-5 of their size; weighted sums within 1e-5 of the norm."""
    assert found.keys() == expected.keys()
    for name, (length, weighted) in expected.items():
        assert found[name] == [pytest.approx(length, rel=1e-5), pytest.approx(weighted, abs=1e-5 * length)], name


def test_t_vaccine_probes_and_trains_as_the_published_code_does():
    expected, model = RECORDED["t_vaccine"], deep_model()
    config = TVaccineConfig(rho=expected["rho"], num_active_layers=2, freeze="attention", probe_batch_size=1)
    defense = TVaccine(config, model, seed=1)
    host = WatchedHost(model, {"probe": [formula_batch(9)]})
    probe = defense._probe(host)
    assert probe["probabilities"] == pytest.approx(expected["probabilities"], rel=1e-5)
    defense.load_state_dict(defense.state_dict() | {"active_layers": expected["active_layers"]})
    report = defense.step(host, formula_batch(0), Position(step=1, starts_step=False))
    assert report.loss.item() == pytest.approx(expected["perturbed_loss"], rel=1e-5)
    found = digest(gradients(model))
    assert {"6.mlp", "7.mlp"} < found.keys(), "above 26 layers the published code reaches one lower"
    assert_digest(found, expected["gradients"])


def test_vaccine_trains_as_the_published_code_does():
    expected, model = RECORDED["vaccine"], deep_model()
    defense = Vaccine(VaccineConfig(rho=expected["rho"]), model, seed=1)
    report = defense.step(WatchedHost(model), formula_batch(0), Position(step=0, starts_step=True))
    assert report.loss.item() == pytest.approx(expected["perturbed_loss"], rel=1e-5)
    assert len(expected["gradients"]) == 2 * NUM_LAYERS
    assert_digest(digest(gradients(model)), expected["gradients"])


def test_oasis_chooses_layers_and_trains_as_the_published_code_does():
    expected, model = RECORDED["oasis"], deep_model().double()
    defense = OASIS(OASISConfig(rho=expected["rho"]), model, seed=1)
    host = WatchedHost(model, {"probe": [formula_batch(9)]})
    report = defense.step(host, formula_batch(0), Position(step=0, starts_step=True))
    assert report.events[0]["scores"] == pytest.approx(expected["scores"], rel=1e-5)
    assert list(report.active_layers) == expected["active_layers"]
    assert report.norms["perturbation_norm"].item() == pytest.approx(expected["perturbation_norm"], rel=1e-5)
    assert report.loss.item() == pytest.approx(expected["perturbed_loss"], rel=1e-5)
    assert_digest(digest(gradients(model)), expected["gradients"])


def test_lisa_changes_the_weights_as_the_published_code_does():
    expected, model = RECORDED["lisa"], deep_model()
    config = LisaConfig(**{key: expected[key] for key in ("rho", "alignment_steps", "user_steps")})
    defense = Lisa(config, model, seed=1)
    host = WatchedHost(model, {"alignment": [formula_batch(100 + number) for number in range(20)]})
    first = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    for step in range(expected["steps_taken"]):
        defense.step(host, formula_batch(step), Position(step, True, num_steps=expected["num_steps"]))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= expected["learning_rate"] * parameter.grad
                    parameter.grad = None
    changes = {name: p - first[name] for name, p in model.named_parameters() if name in first}
    assert_digest(digest(changes), expected["changes"])


def test_booster_trains_as_the_published_code_does():
    expected, model = RECORDED["booster"], deep_model().double()
    config = BoosterConfig(**{key: expected[key] for key in ("regularizer_scale", "harmful_step_size")})
    host = WatchedHost(model, {"harmful": [formula_batch(40)]})
    report = Booster(config, model, seed=1).step(host, formula_batch(0), Position(step=0, starts_step=True))
    for name in ("harmful_loss", "harmful_loss_after_step"):
        assert report.losses[name].item() == pytest.approx(expected[name], rel=1e-5)
    assert len(expected["gradients"]) == 2 * NUM_LAYERS
    assert_digest(digest(gradients(model)), expected["gradients"])


def test_circuit_breakers_train_as_the_published_code_does():
    expected, model = RECORDED["circuit_breaker"], deep_model().double()
    config = CircuitBreakerConfig(**expected["settings"])
    host = WatchedHost(model, {"harmful": [formula_batch(50, prompt=0)], "benign": [formula_batch(80)]})
    position = Position(expected["step"], starts_step=True, num_steps=expected["num_steps"])
    report = CircuitBreaker(config, model, seed=1).step(host, formula_batch(0), position)
    for name in ("reroute_loss", "retain_loss"):
        assert report.losses[name].item() == pytest.approx(expected[name], rel=1e-5)
    assert len(expected["gradients"]) == 2 * NUM_LAYERS
    assert_digest(digest(gradients(model)), expected["gradients"])


def test_crl_trains_as_the_published_code_does():
    expected, model = RECORDED["crl"], deep_model().double()
    host = WatchedHost(model, {"harmful": [formula_batch(50)], "benign": [formula_batch(80)]})
    report = CRL(CRLConfig(**expected["settings"]), model, seed=1).step(host, formula_batch(0), Position(0, True))
    assert report.losses["triplet_benign_loss"].item() == pytest.approx(expected["benign_loss"], rel=1e-5)
    assert report.losses["triplet_harmful_loss"].item() == pytest.approx(expected["harmful_loss"], rel=1e-5)
    assert report.losses["kl_loss"].item() == pytest.approx(expected["kl_loss"], rel=1e-5)
    assert len(expected["gradients"]) == 2 * NUM_LAYERS
    assert_digest(digest(gradients(model)), expected["gradients"])


def test_rep_noise_trains_as_the_published_code_does(monkeypatch):
    expected, model, draws = RECORDED["rep_noise"], deep_model().double(), itertools.count()
    monkeypatch.setattr(torch, "randn", lambda shape, **_: formula_noise(next(draws), shape))
    config = RepNoiseConfig(alpha=expected["alpha"], beta=expected["beta"])
    host = WatchedHost(model, {"pairs": [formula_pair(60)]})
    report = RepNoise(config, model, seed=1).step(host, formula_batch(0), Position(step=0, starts_step=True))
    assert next(draws) == NUM_LAYERS
    for name in ("refusal_loss", "noise_loss", "harmful_loss"):
        assert report.losses[name].item() == pytest.approx(expected[name], rel=1e-5)
    assert len(expected["gradients"]) == 2 * NUM_LAYERS
    assert_digest(digest(gradients(model)), expected["gradients"])


def test_seam_trains_as_the_published_code_does():
    expected, model = RECORDED["seam"], deep_model().double()
    config = SEAMConfig(**{key: expected[key] for key in ("refusal_scale", "self_destruct_scale", "probe_step_size")})
    host = WatchedHost(model, {"pairs": [formula_pair(80)], "benign": [formula_batch(90)]})
    report = SEAM(config, model, seed=1).step(host, formula_batch(0), Position(step=0, starts_step=True))
    for name in ("refusal_loss", "harmful_loss", "self_destruct_loss"):
        assert report.losses[name].item() == pytest.approx(expected[name], rel=1e-5)
    assert len(expected["gradients"]) == 2 * NUM_LAYERS
    assert_digest(digest(gradients(model)), expected["gradients"])


@pytest.mark.parametrize("name", ["tar", "tar_with_switch"])
def test_tar_trains_as_the_published_code_does(name):
    expected, model = RECORDED[name], deep_model().double()
    config, switches = TARConfig(**expected["settings"]), name == "tar_with_switch"
    streams = {"adversary": [formula_batch(200 + k) for k in range(config.inner_steps)]}
    streams["tamper"] = [formula_pair(70) if config.tamper_loss == "dpo" else formula_batch(70)]
    if switches:
        streams["benign"] = [formula_batch(300 + k) for k in range(expected["benign_steps"])]
        streams["retain"] = [formula_batch(77)]
    defense = TAR(config, model, seed=1)
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.requires_grad):
            weight *= expected["weights_times"]
    report = defense.step(WatchedHost(model, streams), formula_batch(0), Position(step=0, starts_step=True))
    retained = report.losses["retain_loss"] + (0 if switches else report.loss)  # x_r is the alignment batch
    assert retained.item() == pytest.approx(expected["retain_loss"], rel=1e-5)
    assert report.losses["tamper_loss"].item() == pytest.approx(expected["tamper_losses"][-1], rel=1e-5)
    assert len(expected["gradients"]) == 2 * NUM_LAYERS
    assert_digest(digest(gradients(model)), expected["gradients"])


def test_lox_changes_a_checkpoint_as_the_published_code_does(tmp_path):
    expected, (base, aligned, output) = RECORDED["lox"], (tmp_path / name for name in ("base", "aligned", "output"))
    deep_checkpoint(aligned=False).save_pretrained(base)
    deep_checkpoint(aligned=True).save_pretrained(aligned)
    apply_lox(aligned, output, rank=expected["rank"], coefficient=expected["coefficient"], base=base)
    found = changes(*(load_file(folder / "model.safetensors") for folder in (aligned, output)))
    assert {"lm_head.weight", "model.embed_tokens"} < expected["changes"].keys()
    assert all(change.ndim == 2 for change in found.values())
    assert_digest(digest(found), expected["changes"])


def test_lox_changes_what_an_adapter_adds_up_to_as_the_published_code_does(tmp_path):
    expected, model = RECORDED["lox_of_adapter"], deep_model()
    model.save_pretrained(tmp_path / "aligned", save_embedding_layers=False)
    settings = {name: expected[name] for name in ("rank", "coefficient")}
    apply_lox(tmp_path / "aligned", tmp_path / "output", **settings)
    after = PeftModel.from_pretrained(model.unload(), str(tmp_path / "output")).merge_and_unload()
    assert len(expected["changes"]) == 2 * NUM_LAYERS
    found = changes(deep_model().merge_and_unload().state_dict(), after.state_dict())
    assert_digest(digest(found), expected["changes"])
