"""Every supported family of models: layers found by structure, perturbed, and trained."""

from __future__ import annotations

import pytest
import torch

from tests.hosts import DirectHost
from tests.models import FAMILIES, random_batch, tiny_model, with_lora
from tvac_plugin.activations import find_blocks
from tvac_plugin.args import TVaccineConfig
from tvac_plugin.defenses import TVaccine
from tvac_plugin.defenses.base import Position


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_step_trains_only_the_drawn_layers(family, adapter, checkpointing):
    model = tiny_model(family)
    if adapter == "lora":
        model = with_lora(model, family=family)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    defense = TVaccine(TVaccineConfig(rho=0.1, num_active_layers=2), model, seed=1)
    host = DirectHost(model, [random_batch(seed=9)])
    report = defense.step(host, random_batch(), Position(0, True))
    assert len(find_blocks(model)) == 4
    assert report.norms["perturbation_norm"].item() == pytest.approx(0.1, rel=1e-4)
    assert report.loss > report.losses["clean_loss"], "the perturbation is meant to raise the loss"
    blocks = find_blocks(model)
    drawn = [p for b in blocks if b.index in report.active_layers for p in b.layer.parameters() if p.requires_grad]
    others = [p for p in model.parameters() if p.requires_grad and not any(p is d for d in drawn)]
    assert drawn
    assert all(p.grad is not None for p in drawn)
    assert all(p.grad is None for p in others)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_no_gradient(family):
    runs = []
    for checkpointing in (False, True):
        model = with_lora(tiny_model(family), family=family, dropout=0.3)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(7)
        defense = TVaccine(TVaccineConfig(rho=1.0, num_active_layers=2), model, seed=1)
        report = defense.step(DirectHost(model, [random_batch(seed=9)]), random_batch(), Position(0, True))
        runs.append((report, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (plain, gradients), (checkpointed, others) = runs
    assert torch.equal(plain.loss, checkpointed.loss)
    assert plain.active_layers == checkpointed.active_layers
    for name, gradient in gradients.items():
        assert torch.equal(gradient, others[name])
