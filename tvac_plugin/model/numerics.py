"""Arithmetic that must come out the same wherever it is needed: precision, norms, and seeds of what is drawn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_FACTORS = (1_000_003, 10_007)
_MOST = 2**63


def precise(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norm over all tensors together, in float32 at least."""
    squares = [precise(tensor).square().sum() for tensor in tensors]
    return torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()


def seed_of(seed: int, *parts: int) -> int:
    """The seed of one draw among many, from a run's seed and up to two numbers that tell the draw, below 2 ** 63."""
    for factor, part in zip(_FACTORS, parts, strict=False):
        seed = seed * factor + part
    return seed % _MOST
