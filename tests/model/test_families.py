"""Every supported family of models: layers found by structure, perturbed where they should be, and trained."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from torch.nn.functional import pad

from tests.support.families import FAMILIES, REFUSED
from tests.support.models import random_batch, random_pair, tiny_model, with_lora
from tvac_plugin.configs.perturbation import TVaccineConfig
from tvac_plugin.configs.unlearning import RepNoiseConfig
from tvac_plugin.defenses import RepNoise, TVaccine
from tvac_plugin.defenses.base import Position
from tvac_plugin.defenses.testing import PlainHost
from tvac_plugin.model.answer_head import find_answer_head
from tvac_plugin.model.architecture import find_blocks
from tvac_plugin.model.hooks import perturb
from tvac_plugin.model.logit_lens import Readout

RHO = 0.1
COMMON = ("llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "gemma2", "gemma3_text", "phi3", "opt", "gpt_neox", "gpt2")


def recorded(model, batch):
    """The input and the output of every module of the blocks in one forward pass, and the logits."""
    seen = {}

    def recorder(key):
        def record(_module, inputs, output):
            hidden = output[0] if isinstance(output, tuple) else output
            seen[key] = (inputs[0].detach().clone() if inputs else None, hidden.detach().clone())

        return record

    with ExitStack() as stack, torch.no_grad():
        for block in find_blocks(model):
            for site in ("attention", "mlp", "layer"):
                if site != "mlp" or block.mlp is not None:
                    handle = block.module(site).register_forward_hook(recorder((block.index, site)))
                    stack.callback(handle.remove)
        seen["logits"] = model(**batch).logits
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_found_by_structure(family):
    model, entry = tiny_model(family), FAMILIES[family]
    blocks = find_blocks(model)
    assert [block.index for block in blocks] == [0, 1, 2, 3]
    assert {type(block.attention).__name__ for block in blocks} == set(entry.attention)
    assert {type(block.mlp).__name__ for block in blocks if block.mlp is not None} == set(entry.mlp)
    assert all((block.mlp is None) == (not entry.mlp) for block in blocks)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_perturbation_lands_at_its_layer_and_is_of_its_length(family):
    model, batch = tiny_model(family).eval(), random_batch()
    clean, block = recorded(model, batch), find_blocks(model)[2]
    for site in ("attention", "mlp", "layer") if FAMILIES[family].mlp else ("attention", "layer"):
        offset = torch.randn(3, 8, 16)
        with perturb({2: block.module(site)}, {2: RHO * offset / offset.norm()}):
            moved = recorded(model, batch)
        assert (moved[2, site][1] - clean[2, site][1]).norm().item() == pytest.approx(RHO, rel=1e-3)
        for below in (key for key in clean if key[0] in (0, 1)):
            assert torch.equal(moved[below][1], clean[below][1])
        assert torch.equal(moved[2, "layer"][0], clean[2, "layer"][0])
        assert not torch.equal(moved[3, "layer"][0], clean[3, "layer"][0])
        assert not torch.equal(moved["logits"], clean["logits"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_final_norm_and_the_head_read_what_the_model_reads(family):
    model, batch = tiny_model(family).eval(), random_batch()
    seen = recorded(model, batch)
    with torch.no_grad():
        torch.testing.assert_close(
            Readout(model, reader="a test")(seen[3, "layer"][1]), seen["logits"], rtol=1e-4, atol=1e-4
        )


def step(model, **settings):
    torch.manual_seed(7)
    model.zero_grad()
    defense = TVaccine(TVaccineConfig(rho=RHO, num_active_layers=2, **settings), model, seed=1)
    return defense.step(PlainHost(model, {"probe": [random_batch(seed=9)]}), random_batch(), Position(0, True))


def has_experts(model):
    return any(parameter.ndim == 3 for parameter in model.parameters())


def steps():
    """Every family with full fine-tuning, and with LoRA; the less common ones under LoRA in the slow tier."""
    for number, family in enumerate(FAMILIES):
        yield pytest.param(family, "full", id=f"full-{family}")
        marks = [pytest.mark.slow] if number % 2 and family not in COMMON else []
        yield pytest.param(family, "lora", id=f"lora-{family}", marks=marks)


@pytest.mark.parametrize(("family", "adapter"), steps())
def test_one_step_trains_only_the_drawn_layers_with_checkpointing_and_without(family, adapter):
    model = tiny_model(family)
    if adapter == "lora":  # PEFT has no dropout for experts
        model = with_lora(model, dropout=0.0 if has_experts(model) else 0.2)
    report = step(model)
    assert report.norms["perturbation_norm"].item() == pytest.approx(RHO, rel=1e-4)
    assert report.loss > report.losses["clean_loss"], "the perturbation is meant to raise the loss"
    blocks, drawn = find_blocks(model), {}
    for name, parameter in model.named_parameters():
        if any(parameter is p for b in blocks if b.index in report.active_layers for p in b.layer.parameters()):
            drawn |= {name: parameter.grad} if parameter.requires_grad else {}
    assert drawn
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == set(drawn)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = step(model)
    assert torch.equal(report.loss, checkpointed.loss)
    assert report.active_layers == checkpointed.active_layers
    for name, parameter in model.named_parameters():
        assert name not in drawn or torch.equal(drawn[name], parameter.grad)


@pytest.mark.parametrize("family", [family for family in FAMILIES if FAMILIES[family].mlp])
def test_a_sample_is_a_row_of_the_batch_whatever_shape_the_feed_forward_part_has(family):
    report = step(tiny_model(family), perturb="mlp", rho_scope="sample")
    assert report.norms["perturbation_norm"].item() == pytest.approx(RHO * 3**0.5, rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_reads_all_states_once_and_may_read_the_answers_alone(family):
    model, batch, calls = tiny_model(family).eval(), random_batch(), []
    targets = pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    kept = targets != -100
    reads_answers_alone = find_answer_head(model) is not None
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _module, inputs: calls.append(tuple(inputs[0].shape)))
    loss = model(**batch, num_items_in_batch=torch.tensor(5)).loss
    assert calls == [(3, 8, 16)]
    handle.remove()
    head.register_forward_pre_hook(lambda _module, inputs: (inputs[0][kept].unsqueeze(0), *inputs[1:]))
    asked = dict(batch, shift_labels=targets[kept].unsqueeze(0), num_items_in_batch=torch.tensor(5))
    if not reads_answers_alone:
        assert not FAMILIES[family].answers_only
        with pytest.raises(ValueError, match="Expected input batch_size"):
            model(**asked)
        return
    torch.testing.assert_close(model(**asked).loss, loss)


def rep_noise_step(model):
    defense = RepNoise(RepNoiseConfig(), model, seed=1)
    host = PlainHost(model, streams={"pairs": [random_pair()]})
    return defense.step(host, random_batch(), Position(0, True))


@pytest.mark.parametrize("family", FAMILIES)
def test_rep_noise_runs_or_says_why_not(family):
    if FAMILIES[family].mlp and family not in ("bloom", "mpt"):
        assert rep_noise_step(tiny_model(family)).norms["regularizer_norm"] > 0
        return
    with pytest.raises(ValueError, match=r"rep_noise needs feed-forward modules, and \w+ has none.*Use another def"):
        rep_noise_step(tiny_model(family))


def test_rep_noise_refuses_logits_that_are_not_the_head_s():
    model = tiny_model("cohere")
    model.config.logit_scale = 1.0
    with pytest.raises(ValueError, match=r"rep_noise cannot read the layers of Cohere.*Use another defense\."):
        rep_noise_step(model)


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_be_defended_is_named_with_the_reason(family):
    with pytest.raises(ValueError, match=REFUSED[family].error):
        find_blocks(tiny_model(family))
