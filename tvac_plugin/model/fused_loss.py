"""Cross-entropy through a frozen head, a few tokens at a time, so that no graph holds the logits of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

TOKENS_AT_A_TIME = 128


@contextmanager
def fused_loss(head: nn.Module, model: Any, targets: Tensor, *, logits: bool) -> Iterator[None]:
    """Inside it `model` takes its loss of `head`'s input, and keeps the gradient of that instead of logits.

    Args:
        head: A frozen linear layer, called once.
        model: Calls `loss_function` on what `head` returns.
        targets: [answers], one for each state that `head` sees.
        logits: Whether `head` returns logits, detached; else they are empty, [1, answers, 0].
    """
    project: Callable[[Tensor], Tensor] = head.forward
    loss_of: Callable[..., Tensor] = model.loss_function
    waiting: list[tuple[Tensor, Tensor]] = []

    def forward(states: Tensor) -> Tensor:
        with torch.no_grad():
            none = project(states[:, :0])
        # in fp16 a gradient needs the loss scale, which only the backward pass knows
        if not states.requires_grad or torch.float16 in (states.dtype, none.dtype):
            return project(states)
        shown = none.new_empty(*states.shape[:-1], none.shape[-1] if logits else 0)
        waiting.append((states, shown))
        return shown

    def loss_function(*args: Any, num_items_in_batch: Tensor | int | None = None, **kwargs: Any) -> Tensor:
        if not waiting:
            return loss_of(*args, num_items_in_batch=num_items_in_batch, **kwargs)
        states, shown = waiting.pop()
        num_items = len(targets) if num_items_in_batch is None else num_items_in_batch
        divisor = torch.as_tensor(num_items, dtype=torch.float32, device=states.device)
        return cast(Tensor, _Loss.apply(states, targets.to(states.device), divisor, project, shown))  # type: ignore[no-untyped-call]

    head.forward = forward
    try:
        with replaced_loss(model, loss_function):
            yield
    finally:
        del head.forward


@contextmanager
def replaced_loss(model: Any, loss_function: Callable[..., Tensor]) -> Iterator[None]:
    """Inside it a transformers model takes another loss."""
    previous = vars(model).get("_loss_function")
    model.loss_function = loss_function
    try:
        yield
    finally:
        if previous is None:
            del model._loss_function
        else:
            model.loss_function = previous


class _Loss(torch.autograd.Function):
    """Sum of the cross-entropies over `divisor`; fills `shown` with the logits if it has room for them."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, targets: Tensor, divisor: Tensor, project: Callable[[Tensor], Tensor], shown: Tensor
    ) -> Tensor:
        flat, flat_shown = states.flatten(0, -2), shown.flatten(0, -2)
        gradient = torch.empty_like(flat)
        total = torch.zeros_like(divisor)
        for start in range(0, len(flat), TOKENS_AT_A_TIME):
            piece = slice(start, start + TOKENS_AT_A_TIME)
            with torch.enable_grad():
                inputs = flat[piece].detach().requires_grad_()
                logits = project(inputs)
                loss = cross_entropy(logits.float(), targets[piece], reduction="sum") / divisor
            (gradient[piece],) = torch.autograd.grad(loss, inputs)
            total += loss.detach()
            if shown.shape[-1]:
                flat_shown[piece] = logits.detach()
        ctx.save_for_backward(gradient.view_as(states))
        return total if len(flat) else total / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None, None, None
