"""The language-model head and its loss on the answer tokens alone; prompt tokens have no label, so no logits either."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from tvac_plugin.defenses.base import Batch

_IGNORED = -100


@contextmanager
def answers_only(head: nn.Module, batch: Batch) -> Iterator[Batch]:
    """Inside it `head` projects only the states that predict a labelled token.

    Args:
        head: The model's output embeddings.
        batch: Model inputs with `labels`, [batch, sequence].

    Yields:
        The inputs to pass to the model: with `shift_labels`, [1, answers], the targets of these states in their order.
    """
    targets = pad(batch["labels"], (0, 1), value=_IGNORED)[:, 1:]
    kept = targets != _IGNORED

    def select(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0][kept.to(inputs[0].device)].unsqueeze(0), *inputs[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield {**batch, "shift_labels": targets[kept].unsqueeze(0)}
    finally:
        handle.remove()


def reads_answers_only(model: nn.Module) -> bool:
    """Whether `model` computes its loss through its head and from `shift_labels`, tried on four tokens.

    Fused losses read the head's weight without calling it, and some architectures do not take `shift_labels`.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Module):
        return False
    batch = _four_tokens(next(model.parameters()).device)
    was_training = model.training
    try:
        model.eval()
        with torch.no_grad(), answers_only(head, batch) as inputs:
            logits = model(**inputs, use_cache=False).logits
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    finally:
        model.train(was_training)
    return logits is not None and logits.shape[:2] == inputs["shift_labels"].shape


def _four_tokens(device: torch.device) -> Batch:
    ids = torch.arange(4, device=device).unsqueeze(0)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.masked_fill(ids < 2, _IGNORED)}
