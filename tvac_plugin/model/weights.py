"""Trainable weights that are moved for a moment and put back bit for bit, and arithmetic on their gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256

import torch
from torch import Tensor, nn

Parameters = Sequence[nn.Parameter]


def copied(parameters: Parameters) -> list[Tensor]:
    """Detached copies."""
    return [parameter.detach().clone() for parameter in parameters]


@contextmanager
def restored(parameters: Parameters) -> Iterator[None]:
    """Puts values and `.grad` of `parameters` back at the end, bit for bit, whatever happened inside.

    Inside, `.grad` is `None`. Subtracting what was added would lose bits; copies do not.
    """
    values, gradients = copied(parameters), [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        yield
    finally:
        assign(parameters, values)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


@contextmanager
def replaced(parameters: Parameters, values: Sequence[Tensor]) -> Iterator[None]:
    """Inside it `parameters` have `values`."""
    with restored(parameters):
        assign(parameters, values)
        yield


@torch.no_grad()
def assign(parameters: Parameters, values: Sequence[Tensor]) -> None:
    """Copies `values` into `parameters`."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


@torch.no_grad()
def move(parameters: Parameters, direction: Sequence[Tensor], distance: Tensor) -> None:
    """Adds `distance` times `direction` to `parameters`."""
    for parameter, part in zip(parameters, direction, strict=True):
        parameter.add_(part * distance.to(part.device, part.dtype))


def combined(*terms: tuple[float, Sequence[Tensor]]) -> list[Tensor]:
    """The sum of scaled gradients, tensor by tensor."""
    return [
        torch.stack([scale * part for (scale, _), part in zip(terms, parts, strict=True)]).sum(dim=0)
        for parts in zip(*(gradients for _, gradients in terms), strict=True)
    ]


def finite(gradients: Sequence[Tensor]) -> list[Tensor]:
    """`gradients`, or zeros if anything in them is not finite: a NaN that is added once never leaves the weights."""
    is_finite = torch.stack([gradient.isfinite().all().to(gradients[0].device) for gradient in gradients]).all()
    return [torch.where(is_finite.to(gradient.device), gradient, 0.0) for gradient in gradients]


NOTHING = 1e-8
"""A weight below this does nothing; an adapter's second half, which starts at 0, leaves it only if it learns."""
_SAMPLED = 20_000


@torch.no_grad()
def fingerprints(parameters: Parameters) -> list[str]:
    """A hash of each tensor's bytes: another one if the tensor was trained. Weights below `NOTHING` count as 0."""
    flat = (_without_nothing(parameter.detach()).contiguous().view(-1).view(torch.uint8) for parameter in parameters)
    return [sha256(part.cpu().numpy().tobytes()).hexdigest() for part in flat]


@torch.no_grad()
def sampled(parameters: Parameters) -> list[float]:
    """Evenly spaced values, about 20,000 in all and at least one of each tensor. Below `NOTHING` they count as 0."""
    stride = sum(parameter.numel() for parameter in parameters) // _SAMPLED | 1  # odd: widths of models are even
    parts = [_without_nothing(parameter.detach().reshape(-1)[::stride]).float().cpu() for parameter in parameters]
    return torch.cat(parts).tolist() if parts else []


def _without_nothing(weight: Tensor) -> Tensor:
    return torch.where(weight.abs() < NOTHING, 0.0, weight)


@torch.no_grad()
def num_not_finite(parameters: Parameters) -> int:
    """How many tensors hold a value that is no number or infinite."""
    return sum(not bool(parameter.isfinite().all()) for parameter in parameters)
