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


class PlainGPT2:
    """GPT-2's forward pass as a function of a dictionary of weights, in any precision."""

    def __init__(self, model: torch.nn.Module, *, num_layers: int, num_heads: int) -> None:
        self.weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
        self.num_layers, self.num_heads = num_layers, num_heads

    def forward(self, weights, ids: Tensor, eps=()) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Logits, the residual stream at each depth (the last one normed), and each feed-forward output.

        Attention outputs without `eps` are left in `self.attended`.
        """
        self.attended = []

        def linear(x: Tensor, name: str) -> Tensor:
            return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

        def norm(x: Tensor, name: str) -> Tensor:
            centred = x - x.mean(-1, keepdim=True)
            scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

        x = weights["transformer.wte.weight"][ids] + weights["transformer.wpe.weight"][: ids.shape[1]]
        depths, feed_forwards = [], []
        for layer in range(self.num_layers):
            depths.append(x)
            name = f"transformer.h.{layer}"
            q, k, v = (
                part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                for part in linear(norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn").chunk(3, dim=-1)
            )
            scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            future = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
            mixed = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
            self.attended.append(linear(mixed.transpose(1, 2).flatten(2), f"{name}.attn.c_proj"))
            x = x + self.attended[-1] + (eps[layer] if len(eps) else 0)
            h = F.gelu(linear(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc"), approximate="tanh")
            feed_forwards.append(linear(h, f"{name}.mlp.c_proj"))
            x = x + feed_forwards[-1]
        depths.append(norm(x, "transformer.ln_f"))
        return depths[-1] @ weights["lm_head.weight"].T, depths, feed_forwards

    def head(self, weights, hidden: Tensor) -> Tensor:
        """What the head reads from the middle of the model."""
        centred = hidden - hidden.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        normed = scaled * weights["transformer.ln_f.weight"] + weights["transformer.ln_f.bias"]
        return normed @ weights["lm_head.weight"].T

    def loss(self, weights, batch, eps=()) -> Tensor:
        """Mean over labelled tokens of -log p."""
        return -torch.stack(answer_log_probabilities(self.forward(weights, batch["input_ids"], eps)[0], batch)).mean()

    def gradient(self, weights, batch) -> dict[str, Tensor]:
        """Gradient of `loss` by every weight."""
        return gradient(self.loss(weights, batch), weights)


class PlainAdapter:
    """GPT-2 under a LoRA, with the adapter and without it."""

    def __init__(self, peft_model: torch.nn.Module, *, num_layers: int, num_heads: int, lora_scale: float) -> None:
        named = {n.removeprefix("base_model.model."): p.detach().clone() for n, p in peft_model.named_parameters()}
        self.adapter = {n: p.requires_grad_() for n, p in named.items() if "lora_" in n}
        self.base = {n.replace(".base_layer", ""): p for n, p in named.items() if "lora_" not in n}
        self.scale = lora_scale
        self.plain = PlainGPT2(torch.nn.Module(), num_layers=num_layers, num_heads=num_heads)

    def adapted(self) -> dict[str, Tensor]:
        """W + s * (B A)^T for every matrix; GPT-2 multiplies from the left."""
        changed = dict(self.base)
        for name, b in self.adapter.items():
            if "lora_B" in name:
                a, module = self.adapter[name.replace("lora_B", "lora_A")], name.split(".lora_")[0]
                changed[f"{module}.weight"] = self.base[f"{module}.weight"] + self.scale * (b @ a).T
        return changed

    def states(self, weights, batch) -> list[Tensor]:
        """Hidden states at each depth, the last one normed."""
        return self.plain.forward(weights, batch["input_ids"])[1]

    def loss(self, batch) -> Tensor:
        """Cross-entropy with the adapter."""
        return self.plain.loss(self.adapted(), batch)

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """Gradient of `loss` by the adapter, under PEFT's names."""
        return {f"base_model.model.{name}": g for name, g in gradient(loss, self.adapter).items()}


def gradient(loss: Tensor, weights) -> dict[str, Tensor]:
    """Gradient of `loss` by every weight."""
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


def answer_log_probabilities(logits: Tensor, batch) -> list[Tensor]:
    """log p of every labelled token, one by one."""
    return [
        logits[row, position - 1].log_softmax(-1)[batch["labels"][row, position]]
        for row in range(len(logits))
        for position in range(1, logits.shape[1])
        if batch["labels"][row, position] != -100
    ]
