"""Tiny random models of many families, and a LoRA on them."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tvac_plugin.defenses.base import Pair

VOCABULARY = 40
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "use_cache": False,
}
_EXTRA = {
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16, "dropout": 0.0, "attention_dropout": 0.0},
    "phi3": {"attention_dropout": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "tie_word_embeddings": False},
    "gpt_neox": {"hidden_dropout": 0.0, "attention_dropout": 0.0},
}
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "opt", "gpt_neox")
_LORA_TARGETS = {
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
}
_LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tiny_model(family: str = "llama", *, seed: int = 0, **overrides: object) -> PreTrainedModel:
    """A random model of `family` with weights wide enough that every layer matters."""
    torch.manual_seed(seed)
    sizes = {**_SIZES, **_EXTRA.get(family, {}), **overrides}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes), attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.15)
    return model.train()


def with_lora(model: PreTrainedModel, *, family: str = "llama", dropout: float = 0.0, seed: int = 0) -> nn.Module:
    """The model under a LoRA whose both halves are random, so that every adapter has a gradient."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=2, lora_alpha=4, lora_dropout=dropout, target_modules=_LORA_TARGETS.get(family, _LLAMA_TARGETS)
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
