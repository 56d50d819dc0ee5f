"""Hooks go on, do their work and come off."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.models import random_batch, tiny_model, with_lora
from tvac_plugin.model.architecture import final_norm, find_blocks
from tvac_plugin.model.hooks import capture, frozen, perturb


def hooks(model):
    return sum(len(m._forward_hooks) for m in model.modules())


def test_norms_with_attention_in_their_name_are_not_taken_for_attention():
    block = find_blocks(tiny_model("opt"))[0]
    assert type(block.attention).__name__ == "OPTAttention"
    assert block.mlp is None
    with pytest.raises(ValueError, match="perturb: mlp is not possible here: OPTDecoderLayer.*Use perturb: attention"):
        block.module("mlp")


@pytest.mark.parametrize("count", [0, 2])
def test_a_model_without_exactly_one_decoder_is_refused(count):
    model = nn.ModuleDict({str(number): tiny_model() for number in range(count)})
    found = "no list" if count == 0 else "2 lists"
    with pytest.raises(ValueError, match=f"cannot be defended: {found} of decoder blocks.*Use a decoder-only"):
        find_blocks(model)


def test_the_language_model_of_a_multimodal_model_is_defended():
    text, vision = tiny_model("gemma3_text").config.to_dict(), {"num_hidden_layers": 2, "hidden_size": 16}
    vision |= {"intermediate_size": 32, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = AutoModelForCausalLM.from_config(config)
    blocks = find_blocks(model)
    assert [type(block.layer).__name__ for block in blocks] == ["Gemma3DecoderLayer"] * 4
    assert final_norm(model) is model.get_decoder().norm


def test_an_adapted_model_is_named_by_its_architecture():
    with pytest.raises(ValueError, match="^MambaForCausalLM cannot be defended"):
        find_blocks(get_peft_model(tiny_model("mamba"), LoraConfig(target_modules=["in_proj"])))


def test_a_layer_may_change_a_captured_output_in_place():
    model = tiny_model("falcon").requires_grad_(False)
    block = find_blocks(model)[0]
    with capture({0: block.module("mlp")}) as outputs:
        loss = model(**random_batch()).loss
        assert torch.autograd.grad(loss, outputs[0])[0].norm() > 0


def test_captured_outputs_require_grad_even_below_frozen_weights():
    model = tiny_model()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    modules = {block.index: block.attention for block in find_blocks(model)}
    with capture(modules) as outputs:
        loss = model(**random_batch()).loss
        gradients = torch.autograd.grad(loss, list(outputs.values()))
    assert all(gradient.norm() > 0 for gradient in gradients)
    assert hooks(model) == 0


def test_perturbing_adds_the_offset_and_nothing_stays():
    model, batch = tiny_model(), random_batch()
    modules = {0: find_blocks(model)[0].attention}
    clean = model(**batch).logits
    with perturb(modules, {0: torch.full((3, 8, 16), 0.5)}) as fired:
        moved = model(**batch).logits
    assert fired.changed == {0: True}
    assert not torch.allclose(clean, moved)
    assert torch.equal(clean, model(**batch).logits)


def test_offsets_take_the_dtype_of_the_output():
    model, batch = tiny_model().to(torch.bfloat16), random_batch()
    with perturb({0: find_blocks(model)[0].attention}, {0: torch.ones(3, 8, 16)}):
        assert model(**batch).logits.dtype is torch.bfloat16


@pytest.mark.parametrize("context", ["capture", "perturb", "frozen"])
def test_an_exception_inside_takes_everything_off(context):
    model = with_lora(tiny_model())
    modules = {block.index: block.attention for block in find_blocks(model)}
    before = [p.requires_grad for p in model.parameters()]
    managers = {
        "capture": lambda: capture(modules),
        "perturb": lambda: perturb(modules, {0: torch.zeros(3, 8, 16)}),
        "frozen": lambda: frozen(list(model.parameters())),
    }
    num_hooks = hooks(model)
    with pytest.raises(KeyError), managers[context]():
        raise KeyError
    assert hooks(model) == num_hooks
    assert [p.requires_grad for p in model.parameters()] == before
