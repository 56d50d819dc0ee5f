"""Undrawn layers keep only their input when `checkpoint_inactive` says so, and no number changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.support.models import random_batch, tiny_model, with_lora
from tvac_plugin.configs.perturbation import TVaccineConfig
from tvac_plugin.defenses import TVaccine
from tvac_plugin.defenses.base import Position
from tvac_plugin.defenses.testing import PlainHost
from tvac_plugin.model.architecture import find_blocks
from tvac_plugin.model.layer_checkpointing import checkpointed


def step(setting, *, recipe_checkpoints=False, dropout=0.3):
    """A probe and a step: report, gradients, bytes saved for backward, and how often each attention module ran."""
    model = with_lora(tiny_model(attention_dropout=dropout), dropout=dropout)
    if recipe_checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    defense = TVaccine(TVaccineConfig(num_active_layers=1, checkpoint_inactive=setting), model, seed=5)
    runs = dict.fromkeys(range(4), 0)
    for block in find_blocks(model):
        block.attention.register_forward_hook(lambda *_, i=block.index: runs.__setitem__(i, runs[i] + 1))
    saved = []
    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        report = defense.step(PlainHost(model, {"probe": [random_batch(seed=9)]}), random_batch(), Position(0, True))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return report, gradients, sum(saved), runs


@pytest.mark.parametrize("recipe_checkpoints", [False, True])
@pytest.mark.parametrize("setting", ["on", "off"])
def test_checkpointing_undrawn_layers_changes_no_bit(setting, recipe_checkpoints):
    plain, other = step("auto"), step(setting, recipe_checkpoints=recipe_checkpoints)
    assert other[0].events == plain[0].events
    assert torch.equal(other[0].loss, plain[0].loss)
    for name, gradient in plain[1].items():
        assert torch.equal(other[1][name], gradient), name


def test_on_recomputes_undrawn_layers_and_no_drawn_one():
    report, _, saved, runs = step("on", recipe_checkpoints=True)
    (drawn,) = report.active_layers
    assert drawn == 1, "layers above and below the drawn one are wanted"
    # probe: every layer twice; pass 1 and 2: layer 0 once for both, layer 1 once each, layers 2 and 3 twice each
    assert runs == {0: 2 + 1, 1: 2 + 2, 2: 2 + 4, 3: 2 + 4}
    assert saved < step("off")[2]


def test_auto_is_what_the_recipe_says_for_all_layers():
    assert step("auto")[3] == {0: 1 + 1, 1: 1 + 2, 2: 1 + 2, 3: 1 + 2}
    assert step("auto", recipe_checkpoints=True)[3] == {0: 2 + 1, 1: 2 + 4, 2: 2 + 4, 3: 2 + 4}


def test_off_checkpoints_no_undrawn_layer():
    assert step("off", recipe_checkpoints=True)[3] == {0: 1 + 1, 1: 1 + 4, 2: 1 + 2, 3: 1 + 2}


@pytest.mark.parametrize(("written", "meant"), [(True, "on"), (False, "off"), ("auto", "auto")])
def test_a_bare_on_or_off_of_yaml_is_understood(written, meant):
    assert TVaccineConfig.model_validate({"checkpoint_inactive": written}).checkpoint_inactive == meant


def test_switches_come_back_after_an_exception():
    model = tiny_model()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    layer = find_blocks(model)[0].layer
    before = dict(layer.__dict__)
    with pytest.raises(KeyError), checkpointed({layer: False}):
        raise KeyError
    assert layer.__dict__ == before


def test_layers_without_a_switch_are_refused():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.Linear(4, 4)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Layer(), Layer()])

    with pytest.raises(ValueError, match=r"checkpoint_inactive: the layers of Model have no switch.*Set it to auto"):
        TVaccine(TVaccineConfig(num_active_layers=1, checkpoint_inactive="on"), Model(), seed=1)
