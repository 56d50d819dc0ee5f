"""Means over the training processes, of many tensors in few messages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

_BUCKET_BYTES = 32 * 2**20


def mean_across_processes(accelerator: Accelerator, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The mean of each of `tensors` over all processes, the same to the bit on each of them.

    Divides before it adds, as DDP does, so that a scaled fp16 gradient does not overflow in the sum.

    Args:
        accelerator: Knows the processes; with one of them the tensors are returned as they are.
        tensors: Of the same shapes and types, in the same order, on every process.
    """
    if accelerator.num_processes == 1:
        return list(tensors)
    means: list[Tensor] = []
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket]) / accelerator.num_processes
        parts = accelerator.reduce(flat, reduction="sum").split([tensor.numel() for tensor in bucket])
        means += [part.view_as(tensor) for part, tensor in zip(parts, bucket, strict=True)]
    return means


def average_gradients(accelerator: Accelerator, parameters: Iterable[nn.Parameter]) -> None:
    """Puts the mean over all processes into every `.grad`.

    A parameter that no process has a gradient for is not sent and keeps none; one that only some have a gradient
    for, such as an expert that no token of a process went to, counts as zero on the others.

    Args:
        accelerator: Knows the processes.
        parameters: The same, in the same order, on every process.
    """
    if accelerator.num_processes == 1:
        return
    candidates = list(parameters)
    held = torch.tensor([float(p.grad is not None) for p in candidates], device=accelerator.device)
    somewhere = accelerator.reduce(held, reduction="sum").tolist()
    learning = [p for p, count in zip(candidates, somewhere, strict=True) if count]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in learning]
    for parameter, mean in zip(learning, mean_across_processes(accelerator, gradients), strict=True):
        parameter.grad = mean


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors of one type and device, about `_BUCKET_BYTES` together."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        is_other = bucket and (tensor.dtype, tensor.device) != (bucket[0].dtype, bucket[0].device)
        if is_other or size >= _BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel() * tensor.element_size()
    if bucket:
        yield bucket
