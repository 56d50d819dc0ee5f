"""A Llama of 28 layers whose weights and batches follow formulas, so that recorded numbers hold on any version."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

NUM_LAYERS = 28
_VOCABULARY = 32


def deep_model() -> nn.Module:
    """The model under a LoRA of rank 2 on all linear modules, in float32."""
    wrapped = get_peft_model(_llama(), LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"))
    _fill(wrapped)
    return wrapped.train()


def deep_checkpoint(*, aligned: bool) -> nn.Module:
    """The model without a LoRA; an aligned one differs in every weight, and in every matrix by one of full rank."""
    model = _llama()
    _fill(model)
    if aligned:
        with torch.no_grad():
            for number, (_, parameter) in enumerate(sorted(model.named_parameters())):
                parameter += 0.02 * formula_noise(number, parameter.shape)
    return model


def _llama() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=_VOCABULARY, num_hidden_layers=NUM_LAYERS, use_cache=False, **sizes)
    model: nn.Module = LlamaForCausalLM._from_config(config, attn_implementation="eager")
    return model


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    for number, (_, parameter) in enumerate(sorted(model.named_parameters())):
        if parameter.ndim >= 2:
            count = torch.arange(parameter.numel(), dtype=torch.float64)
            parameter.copy_((0.2 * torch.sin(1.37 * (count + 1) * (number + 1))).reshape(parameter.shape))


def formula_batch(number: int, *, rows: int = 3, length: int = 8, prompt: int = 3) -> dict[str, Tensor]:
    """The `number`-th batch: token ids with the prompt masked out of the labels."""
    count = torch.arange(rows * length)
    ids = ((count * count * 7 + count * (2 * number + 3) + 5 * number) % (_VOCABULARY - 2) + 2).reshape(rows, length)
    labels = ids.clone()
    labels[:, :prompt] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def formula_pair(number: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two answers to the prompts of the `number`-th batch, which share two tokens."""
    first, second = formula_batch(number), formula_batch(number + 2)
    is_prompt = first["labels"] == -100
    second["input_ids"] = torch.where(is_prompt, first["input_ids"], second["input_ids"])
    return first, second


def formula_noise(number: int, shape: torch.Size) -> Tensor:
    """The `number`-th draw in place of a normal one, in float64."""
    count = torch.arange(shape.numel(), dtype=torch.float64)
    return (1.4 * torch.sin(0.73 * (count + 1) * (count + number + 2))).reshape(shape)


def digest(tensors: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """For the attention and the MLP of each layer: the L2 norm of its tensors, and their sum weighted by cosines.

    What is in no layer has an entry under the first two parts of its name.

    Args:
        tensors: By the parameter's name.
    """
    parts: dict[str, list[Tensor]] = {}
    for name, tensor in sorted(tensors.items()):
        layer, module = name.split("layers.")[-1].split(".")[:2]
        parts.setdefault(f"{layer}.{module}", []).append(tensor.detach().double().flatten())
    whole = {name: torch.cat(values) for name, values in parts.items()}
    return {
        name: [value.norm().item(), (value * torch.cos(torch.arange(len(value), dtype=torch.float64))).sum().item()]
        for name, value in whole.items()
    }
