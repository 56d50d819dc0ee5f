"""The language-model head and its loss on the answer tokens alone; prompt tokens have no label, so no logits either."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.loss.loss_utils import ForCausalLMLoss

from tvac_plugin.model.four_bit import kept_trainable
from tvac_plugin.model.fused_loss import fused_loss, replaced_loss
from tvac_plugin.model.types import Batch

_IGNORED = -100


class AnswerHead(NamedTuple):
    """How a model gets from its last hidden states to its loss.

    Attributes:
        module: Its output embeddings.
        model: What takes the usual loss of `module`'s output as it is; `None` if logits are scaled or capped before.
    """

    module: nn.Module
    model: nn.Module | None

    @property
    def can_fuse(self) -> bool:
        """Whether the loss can be taken piece by piece: the head is a bare linear layer that does not learn."""
        is_bare = type(self.module) is nn.Linear and "forward" not in vars(self.module)
        return self.model is not None and is_bare and not any(p.requires_grad for p in self.module.parameters())


@contextmanager
def answers_only(head: AnswerHead, batch: Batch, *, logits: bool = True) -> Iterator[Batch]:
    """Inside it `head` projects only the states that predict a labelled token.

    Args:
        head: As `find_answer_head` gives it.
        batch: Model inputs with `labels`, [batch, sequence].
        logits: Whether the caller reads the model's logits; else they may be empty, [1, answers, 0].

    Yields:
        The inputs to pass to the model: with `shift_labels`, [1, answers], the targets of these states in their order.
    """
    targets = pad(batch["labels"], (0, 1), value=_IGNORED)[:, 1:]
    kept = targets != _IGNORED

    def select(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0][kept.to(inputs[0].device)].unsqueeze(0), *inputs[1:])

    with ExitStack() as stack:
        stack.callback(head.module.register_forward_pre_hook(select).remove)
        if head.can_fuse:
            stack.enter_context(fused_loss(head.module, head.model, targets[kept], logits=logits))
        yield {**batch, "shift_labels": targets[kept].unsqueeze(0)}


def find_answer_head(model: Any) -> AnswerHead | None:
    """Tries on four tokens whether `model` computes its loss through its head and from `shift_labels`.

    The trial changes nothing in the model. Fused losses read the head's weight without calling it, and some
    architectures do not take `shift_labels`.

    Returns:
        The head, or `None` if it has to see all tokens.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        return None
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    was_training = model.training
    try:
        model.eval()
        trial = answers_only(AnswerHead(head, None), _four_tokens(model))
        with torch.no_grad(), kept_trainable(model), _watched(head, base) as watched, trial as inputs:
            logits = model(**inputs, use_cache=False).logits
    except (TypeError, ValueError, RuntimeError, IndexError):
        return None
    finally:
        model.train(was_training)
    if logits is None or logits.shape[:2] != inputs["shift_labels"].shape:
        return None
    return AnswerHead(head, base if watched.is_direct() else None)


class _Watched(NamedTuple):
    """What the head returned, and what went into the usual loss."""

    projected: list[Tensor]
    scored: list[Tensor]

    def is_direct(self) -> bool:
        return len(self.projected) == len(self.scored) == 1 and self.projected[0] is self.scored[0]


@contextmanager
def _watched(head: nn.Module, model: Any) -> Iterator[_Watched]:
    watched = _Watched([], [])

    def loss(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        watched.scored.append(logits)
        found: Tensor = ForCausalLMLoss(logits, *args, **kwargs)
        return found

    handle = head.register_forward_hook(lambda _module, _inputs, output: watched.projected.append(output))
    with handle:
        if getattr(model, "loss_function", None) is not ForCausalLMLoss:
            yield watched
        else:
            with replaced_loss(model, loss):
                yield watched


def _four_tokens(model: nn.Module) -> Batch:
    ids = torch.arange(4, device=next(model.parameters()).device).unsqueeze(0)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.masked_fill(ids < 2, _IGNORED)}
