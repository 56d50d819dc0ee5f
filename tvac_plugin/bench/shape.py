"""What is measured on: a random Llama with LoRA, and random rows, both made from a shape and a seed."""

from __future__ import annotations

from typing import Literal

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from pydantic import BaseModel, ConfigDict, Field, model_validator
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.model.types import Batch

HEAD_SIZE = 64
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_IGNORED = -100


class Shape(BaseModel):
    """Sizes of the model and of a batch. Feed-forward layers are 2.6875 times as wide as the model, as in Llama 2."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_layers: int = Field(default=16, ge=1)
    hidden_size: int = Field(default=512, ge=HEAD_SIZE)
    sequence_len: int = Field(default=128, ge=2)
    batch_size: int = Field(default=4, ge=1)
    num_active_layers: int = Field(default=4, ge=1)
    vocabulary_size: int = Field(default=32_000, ge=3)
    lora_rank: int = 8
    attention: Literal["eager", "sdpa"] = "eager"
    loss_type: Literal["nll", "chunked_nll"] = "nll"
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"

    @model_validator(mode="after")
    def _refuse_what_cannot_be_built(self) -> Shape:
        if self.num_active_layers > self.num_layers:
            raise UserError(
                f"{self.num_active_layers} drawn layers are more than the model's {self.num_layers}. Draw "
                f"{self.num_layers} or fewer"
            )
        if self.hidden_size % HEAD_SIZE:
            raise UserError(
                f"a width of {self.hidden_size} is not a multiple of {HEAD_SIZE}, an attention head's. Take "
                f"{max(1, round(self.hidden_size / HEAD_SIZE)) * HEAD_SIZE}"
            )
        return self


def build_model(shape: Shape, *, seed: int) -> nn.Module:
    """A random model whose LoRA halves are both random, so that every adapter has a gradient."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=shape.vocabulary_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.hidden_size * 43 // 16,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.hidden_size // HEAD_SIZE,
            max_position_embeddings=shape.sequence_len,
            use_cache=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
        )
        with torch.device(shape.device):
            base = LlamaForCausalLM._from_config(
                config, attn_implementation=shape.attention, dtype=getattr(torch, shape.dtype)
            )
        lora = LoraConfig(r=shape.lora_rank, lora_dropout=0.0, target_modules=LORA_TARGETS, init_lora_weights=False)
        model: nn.Module = get_peft_model(base, lora).to(shape.device)
    return model.train()


def random_rows(shape: Shape, num_rows: int, *, seed: int, answer_seed: int | None = None) -> Dataset:
    """Tokenized rows, the first half of each a prompt that counts for nothing in the loss, the second an answer.

    Args:
        shape: Length and vocabulary.
        num_rows: How many.
        seed: The same seed gives the same prompts.
        answer_seed: Of the answers, so that two sets may answer the same prompts differently; `None` for `seed`.
    """
    prompts, answers = (_tokens(shape, num_rows, seed=s) for s in (seed, seed if answer_seed is None else answer_seed))
    half = shape.sequence_len // 2
    ids = torch.cat([prompts[:, :half], answers[:, half:]], dim=1)
    labels = ids.clone()
    labels[:, :half] = _IGNORED
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


def word_tokenizer(shape: Shape) -> PreTrainedTokenizerFast:
    """Every id is a word of its own, so that rows which differ do so as text too; the first two pad and end."""
    words = {f"w{number}": number for number in range(shape.vocabulary_size)}
    model = Tokenizer(WordLevel(words, unk_token="w0"))  # noqa: S106 (a word)
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="w0", eos_token="w1", unk_token="w0")  # noqa: S106


def random_batch(shape: Shape, *, seed: int) -> Batch:
    """A batch of such rows without padding; each tensor is [batch, sequence], on the CPU."""
    rows = random_rows(shape, shape.batch_size, seed=seed).with_format("torch")[:]
    return {**rows, "attention_mask": torch.ones_like(rows["input_ids"])}


def _tokens(shape: Shape, num_rows: int, *, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, shape.vocabulary_size, (num_rows, shape.sequence_len), generator=generator)
