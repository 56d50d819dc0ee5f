"""Layers below the lowest drawn one run once, and no number changes."""

from __future__ import annotations

import pytest
import torch

from tests.support.models import random_batch, tiny_model, with_lora
from tvac_plugin.configs.perturbation import TVaccineConfig
from tvac_plugin.defenses import TVaccine
from tvac_plugin.defenses.base import Position
from tvac_plugin.defenses.testing import PlainHost
from tvac_plugin.model.architecture import find_blocks
from tvac_plugin.model.shared_prefix import SharedPrefix

LATER = Position(step=1, starts_step=False)


def step(*, shared=True, drawn=(2, 3), lora=True, dropout=0.0, checkpointing=False, **settings):
    """One step with `drawn` layers: report, gradients by name, and how often each feed-forward module ran."""
    model = tiny_model(attention_dropout=dropout)
    model = with_lora(model, dropout=dropout) if lora else model
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    defense = TVaccine(TVaccineConfig(num_active_layers=len(drawn), **settings), model, seed=1)
    defense.load_state_dict({"num_probes": 1, "probabilities": [0.25] * 4, "active_layers": list(drawn)})
    if not shared:
        defense._layers.below = lambda _drawn: []
    runs = dict.fromkeys(range(4), 0)

    def count(index):
        def hook(*_):
            runs[index] += 1

        return hook

    handles = [b.mlp.register_forward_hook(count(b.index)) for b in find_blocks(model)]
    torch.manual_seed(5)
    report = defense.step(PlainHost(model), random_batch(), LATER)
    after = torch.rand(1)
    for handle in handles:
        handle.remove()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert not any("forward" in block.layer.__dict__ for block in find_blocks(model))
    return report, gradients, runs, after


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("options", [{}, {"checkpointing": True}, {"perturb": "layer"}, {"freeze": "attention"}])
def test_sharing_the_layers_below_changes_no_bit(lora, dropout, options):
    shared, plain = (step(shared=on, lora=lora, dropout=dropout, **options) for on in (True, False))
    assert torch.equal(shared[0].loss, plain[0].loss)
    assert torch.equal(shared[0].losses["clean_loss"], plain[0].losses["clean_loss"])
    assert shared[1].keys() == plain[1].keys()
    for name, gradient in plain[1].items():
        assert torch.equal(shared[1][name], gradient), name
    assert torch.equal(shared[3], plain[3]), "the random stream goes on as if every layer had run"


def test_layers_below_run_once_and_the_others_twice():
    assert step()[2] == {0: 1, 1: 1, 2: 2, 3: 2}
    assert step(shared=False)[2] == {0: 2, 1: 2, 2: 2, 3: 2}


@pytest.mark.parametrize("options", [{"freeze": "none"}, {"freeze": "attention", "lora": False}])
def test_nothing_is_shared_where_something_below_learns(options):
    assert step(**options)[2] == {0: 2, 1: 2, 2: 2, 3: 2}


@pytest.mark.parametrize("extra", [{"output_router_logits": True}, {"num_kv_shared_layers": 1}])
def test_layers_whose_side_outputs_are_read_later_are_not_shared(extra):
    model = with_lora(tiny_model())
    model.config.update(extra)
    defense = TVaccine(TVaccineConfig(num_active_layers=1), model, seed=1)
    defense.load_state_dict({"num_probes": 1, "probabilities": [0.25] * 4, "active_layers": [3]})
    assert defense._layers.below([3]) == []


def test_the_shared_layers_keep_no_autograd_state():
    model = with_lora(tiny_model())
    layers = [block.layer for block in find_blocks(model)[:2]]
    saved = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor),
        SharedPrefix(layers).recorded(),
    ):
        hidden = model.get_input_embeddings()(torch.tensor([[3, 4]]))
        positions = torch.arange(2)[None]
        rotary = model.base_model.model.model.rotary_emb(hidden, position_ids=positions)
        before = len(saved)
        for layer in layers:
            hidden = layer(hidden, position_embeddings=rotary, position_ids=positions)
    assert len(saved) == before
    assert not hidden.requires_grad


def test_a_forward_that_was_replaced_before_comes_back():
    model = tiny_model()
    layer = find_blocks(model)[0].layer
    other = layer.forward = lambda hidden, **_: hidden
    with pytest.raises(KeyError), SharedPrefix([layer]).recorded():
        raise KeyError
    assert layer.__dict__["forward"] is other
