"""Tiny random models of many families, and a LoRA on them."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from tests.support.families import FAMILIES, REFUSED, SIZES
from tvac_plugin.model.types import Pair

VOCABULARY = SIZES["vocab_size"]


def tiny_model(family: str = "llama", *, seed: int = 0, **overrides: object) -> PreTrainedModel:
    """A random model of `family` with weights wide enough that every layer matters."""
    torch.manual_seed(seed)
    entry = FAMILIES.get(family) or REFUSED[family]
    sizes = {key: value for key, value in {**SIZES, **entry.options}.items() if value is not None}
    config = AutoConfig.for_model(family, **{**sizes, **overrides})
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.15)
    return model.train()


def with_lora(model: PreTrainedModel, *, dropout: float = 0.0, seed: int = 0) -> nn.Module:
    """The model under a LoRA whose both halves are random, so that every adapter has a gradient."""
    torch.manual_seed(seed)
    config = LoraConfig(  # PEFT cannot wrap a router that returns a tuple (Llama 4)
        r=2, lora_alpha=4, lora_dropout=dropout, target_modules="all-linear", exclude_modules=r".*\.router"
    )
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    wrapped.enable_input_require_grads()
    return wrapped.train()


def random_batch(*, seed: int = 0, rows: int = 3, length: int = 8, prompt: int = 3) -> dict[str, torch.Tensor]:
    """Token ids with the prompt masked out of the labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, :prompt] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def precise_gpt2() -> nn.Module:
    """A random GPT-2 in float64, which unlike Llama takes no norm in float32."""
    return tiny_model("gpt2").double()


def random_pair(*, seed: int = 0, rows: int = 3, prompt: int = 3) -> Pair:
    """The same prompts with two answers of different lengths, padded."""
    harmful, refusal = (random_batch(seed=seed + i, rows=rows, prompt=prompt) for i in (0, 100))
    refusal["input_ids"][:, :prompt] = harmful["input_ids"][:, :prompt]
    refusal["input_ids"][:, prompt + 1] = harmful["input_ids"][:, prompt + 1]
    refusal["labels"] = refusal["input_ids"].clone()
    refusal["labels"][:, :prompt] = -100
    for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        refusal[name][:, -2:] = fill
    return Pair(harmful, refusal)
