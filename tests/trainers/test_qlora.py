"""A base model in 4 bits (bitsandbytes nf4) trains with a defense as an unquantized one does."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.support.models import random_batch, tiny_model
from tests.trainers.test_sft import WORLD, config, rows, weights
from tvac_plugin import SafetyDefenseSFTTrainer, TVaccineConfig
from tvac_plugin.defenses import TVaccine
from tvac_plugin.defenses.base import Position
from tvac_plugin.defenses.testing import PlainHost
from tvac_plugin.model.answer_head import find_answer_head
from tvac_plugin.provenance.manifest import verify
from tvac_plugin.tiny_world.base_model import build_tokenizer

pytest.importorskip("bitsandbytes")
TOKENIZER = build_tokenizer(WORLD)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_model(vocab_size=len(TOKENIZER), hidden_size=64, intermediate_size=64, num_attention_heads=2, head_dim=32,
               num_key_value_heads=2).save_pretrained(folder)  # fmt: skip
    return folder


def quantized(base):
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=nf4, dtype=torch.float32)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "o_proj", "up_proj", "down_proj"]))


def frozen_bytes(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpoint_inactive", ["auto", "on"])
def test_drawn_adapters_learn_and_nothing_else_moves(base, tmp_path, adapter_dtype, checkpoint_inactive):
    model = quantized(base)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(adapter_dtype)
    run = SafetyDefenseSFTTrainer(
        model=model,
        args=config(tmp_path, max_steps=1),
        train_dataset=rows(WORLD.hazards[:10], refuse=True),
        processing_class=TOKENIZER,
        defense=TVaccineConfig(rho=0.5, num_active_layers=2, checkpoint_inactive=checkpoint_inactive),
        harmful_dataset=rows(WORLD.hazards[10:], refuse=False),
    )
    before, frozen, dtypes = weights(run), frozen_bytes(model), {n: p.dtype for n, p in model.named_parameters()}
    run.train()
    run.save_model()
    moved = {n.split("layers.")[1].split(".")[0] for n, w in weights(run).items() if not torch.equal(w, before[n])}
    assert moved == {str(layer) for layer in run._defense._active}
    assert all(torch.equal(weight, frozen[name]) for name, weight in frozen_bytes(model).items())
    assert {n: p.dtype for n, p in model.named_parameters()} == dtypes
    assert verify(tmp_path)["hook_fires"] == 2
    assert run.state.log_history[0]["safety/perturbation_norm"] == pytest.approx(0.5, rel=1e-2)


def test_rho_zero_with_every_layer_has_the_gradient_of_plain_training(base):
    found = []
    for defended in (False, True):
        model, batch = quantized(base).train(), random_batch()
        if defended:
            defense = TVaccine(TVaccineConfig(rho=0.0, num_active_layers=4, layer_sampling="uniform"), model, seed=1)
            defense.step(PlainHost(model), batch, Position(0, True))
        else:
            model(**batch).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7)


def four_bit(model):
    return [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]


def as_on_avx512_bf16(model):
    """Lets 4-bit layers pack their weights in evaluation, whatever the processor."""
    for layer in four_bit(model):
        layer.support_avx512bf16_for_cpu = True
    return model


def states(layer):
    state = layer.weight.quant_state.as_dict(packed=False)
    return [state.get(key) for key in ("absmax", "nested_absmax", "dtype")]


def marks(model):
    """Everything of the 4-bit layers that packing, or a first look at an input, would change."""
    return [
        (layer.weight.detach().clone(), layer.compute_dtype, layer.compute_type_is_set, *states(layer))
        for layer in four_bit(model)
    ]


def test_the_trial_of_the_head_leaves_no_mark_on_4_bit_weights(base):
    model = as_on_avx512_bf16(quantized(base).train())
    before = marks(model)
    assert len(before) == 28
    assert find_answer_head(model) is not None
    for was, now in zip(before, marks(model), strict=True):
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(was, now, strict=True))
    assert all(layer.support_avx512bf16_for_cpu for layer in four_bit(model))
    model(**random_batch()).loss.backward()
    gradients = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def trained(base, folder, **settings):
    model = as_on_avx512_bf16(quantized(base))
    run = SafetyDefenseSFTTrainer(
        model=model,
        args=config(folder, max_steps=3, learning_rate=0.1, **settings),
        train_dataset=rows(WORLD.hazards[:10], refuse=True),
        eval_dataset=rows(WORLD.hazards[:4], refuse=True),
        processing_class=TOKENIZER,
        defense=TVaccineConfig(rho=0.5, num_active_layers=4),
        harmful_dataset=rows(WORLD.hazards[10:], refuse=False),
    )
    return run


def test_evaluation_between_the_steps_changes_no_weight(base, tmp_path):
    runs = [trained(base, tmp_path / "without"), trained(base, tmp_path / "with", eval_strategy="steps", eval_steps=1)]
    for run in runs:
        run.train()
    without, with_evaluation = map(weights, runs)
    assert [n for n, w in without.items() if "lora_" in n and not torch.equal(w, with_evaluation[n])] == []


def test_a_model_packed_for_inference_is_refused(base, tmp_path):
    run = trained(base, tmp_path)
    four_bit(run.model)[0].weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="Load the model again"):
        run.train()
    with pytest.raises(ValueError, match="Load the model again"):
        run.configure_defense(TVaccineConfig(num_active_layers=4), record=run._record)
