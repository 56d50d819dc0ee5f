"""T-Vaccine on Llama with LoRA, written out without hooks, modules or the package under test."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

EPSILON_OF_NORM = 1e-6


class PlainLlama:
    """Llama's forward pass as equations over a dictionary of weights; `eps[l]` is added to attention output l."""

    def __init__(self, peft_model: torch.nn.Module, *, num_layers: int, num_heads: int, lora_scale: float) -> None:
        named = peft_model.named_parameters()
        self.weights = {n.removeprefix("base_model.model."): p.detach().clone() for n, p in named}
        self.adapters = {n: w.requires_grad_() for n, w in self.weights.items() if "lora_" in n}
        self.num_layers, self.num_heads, self.scale = num_layers, num_heads, lora_scale

    def linear(self, x: Tensor, name: str) -> Tensor:
        weight = self.weights[f"{name}.base_layer.weight"]
        a = self.weights[f"{name}.lora_A.default.weight"]
        b = self.weights[f"{name}.lora_B.default.weight"]
        return x @ (weight + self.scale * b @ a).T

    def norm(self, x: Tensor, name: str) -> Tensor:
        return self.weights[name] * x / (x.square().mean(-1, keepdim=True) + EPSILON_OF_NORM).sqrt()

    def rotate(self, x: Tensor) -> Tensor:
        length, size = x.shape[-2:]
        frequencies = 10000.0 ** (-torch.arange(0, size, 2, dtype=x.dtype) / size)
        angles = torch.arange(length, dtype=x.dtype)[:, None] * frequencies
        cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)
        left, right = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-right, left], -1) * sin

    def attention(self, x: Tensor, name: str) -> Tensor:
        rows, length, width = x.shape
        split = (rows, length, self.num_heads, width // self.num_heads)
        q, k, v = (self.linear(x, f"{name}.{p}_proj").view(split).transpose(1, 2) for p in "qkv")
        scores = self.rotate(q) @ self.rotate(k).transpose(-1, -2) / split[-1] ** 0.5
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        return self.linear(mixed.transpose(1, 2).reshape(rows, length, width), f"{name}.o_proj")

    def loss(self, batch: dict[str, Tensor], eps: dict[int, Tensor]) -> Tensor:
        x = self.weights["model.embed_tokens.weight"][batch["input_ids"]]
        for layer in range(self.num_layers):
            name = f"model.layers.{layer}"
            e = self.attention(self.norm(x, f"{name}.input_layernorm.weight"), f"{name}.self_attn")
            x = x + e + eps.get(layer, 0.0)
            h = self.norm(x, f"{name}.post_attention_layernorm.weight")
            gate = F.silu(self.linear(h, f"{name}.mlp.gate_proj"))
            x = x + self.linear(gate * self.linear(h, f"{name}.mlp.up_proj"), f"{name}.mlp.down_proj")
        logits = self.norm(x, "model.norm.weight") @ self.weights["lm_head.weight"].T
        targets = batch["labels"][:, 1:]
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)

    def activation_gradients(self, batch: dict[str, Tensor], layers: list[int]) -> dict[int, Tensor]:
        """g_l = dL/de_l, as the derivative by a perturbation at zero."""
        shape = (*batch["input_ids"].shape, self.weights["model.norm.weight"].numel())
        zeros = {layer: torch.zeros(shape, requires_grad=True) for layer in layers}
        gradients = torch.autograd.grad(self.loss(batch, zeros), list(zeros.values()))
        return dict(zip(layers, gradients, strict=True))
