"""Benign retention: how likely a model still finds the answers that it gave before it was aligned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import bootstrap
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.evaluation.generation import Generator
from tvac_plugin.evaluation.prompts import Prompt, load_prompts
from tvac_plugin.evaluation.recipe import Retention
from tvac_plugin.model.answer_head import AnswerHead, answers_only, find_answer_head

_IGNORED = -100
_RESAMPLES = 2000


class AnswerLoss(NamedTuple):
    """The loss of one model on one answer.

    Attributes:
        loss: Cross-entropy summed over the answer's tokens, nats.
        num_tokens: How many these are.
    """

    loss: float
    num_tokens: int


class RowLoss(NamedTuple):
    """The loss of a model on one answer beside that of the model it is held against.

    Attributes:
        num_tokens: The answer's tokens.
        loss: Cross-entropy summed over them, nats.
        base_loss: The same for the other model.
    """

    num_tokens: int
    loss: float
    base_loss: float


def retained_prompts(source: Retention) -> list[Prompt]:
    """The prompts of a retention with their answers.

    Raises:
        UserError: No model is named that gave them, or they are too few for an interval.
    """
    if source.of is None:
        raise UserError("retention: `of:` is missing. Name the folder or hub id of the model before alignment.")
    prompts = load_prompts(source.prompts, key="retention.prompts", need_reference=True)
    if len(prompts) < 2:
        raise UserError(f"retention.prompts: {source.prompts.path} has 1 prompt, and an interval needs 2. Add more.")
    return prompts


@torch.inference_mode()
def answer_losses(
    generator: Generator, prompts: Sequence[Prompt], *, batch_size: int, description: str
) -> list[AnswerLoss]:
    """Has a model read the reference answers behind their prompts, and takes the loss of the answers' tokens.

    What follows an answer, as the end of the turn, is not read. Only the states that predict an answer's token are
    projected to logits, where the model's head can be told apart.

    Args:
        generator: The model with its tokenizer.
        prompts: Prompts with references.
        batch_size: Rows at a time; they are padded on the right.
        description: Of the progress bar.
    """
    rows = [_tokens(generator, prompt) for prompt in prompts]
    head = find_answer_head(generator.model)
    losses: list[AnswerLoss] = []
    for start in tqdm(range(0, len(rows), batch_size), desc=description):
        losses += _losses(generator, rows[start : start + batch_size], head)
    return losses


def _tokens(generator: Generator, prompt: Prompt) -> tuple[Tensor, Tensor]:
    """A row's token ids, and its labels, which are ignored for the prompt."""
    texts = generator.prompt(prompt.text), str(prompt.reference).strip()
    asked, answer = (
        torch.tensor(generator.tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.long) for text in texts
    )
    return torch.cat([asked, answer]), torch.cat([torch.full_like(asked, _IGNORED), answer])


def _losses(generator: Generator, rows: Sequence[tuple[Tensor, Tensor]], head: AnswerHead | None) -> list[AnswerLoss]:
    device = generator.model.device
    ids = pad_sequence([ids for ids, _ in rows], batch_first=True).to(device)
    mask = pad_sequence([torch.ones_like(ids) for ids, _ in rows], batch_first=True).to(device)
    labels = pad_sequence([labels for _, labels in rows], batch_first=True, padding_value=_IGNORED).to(device)
    targets = pad(labels, (0, 1), value=_IGNORED)[:, 1:]
    kept = targets != _IGNORED
    if head is None:
        logits = generator.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[kept]
    else:
        with answers_only(AnswerHead(head.module, None), {"labels": labels}):
            logits = generator.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
    counts = kept.sum(dim=1).tolist()
    pairs = zip(torch.split(logits, counts), torch.split(targets[kept], counts), strict=True)
    return [
        AnswerLoss(cross_entropy(row.float(), wanted, reduction="sum").item(), len(wanted)) for row, wanted in pairs
    ]


def row_losses(ours: Sequence[AnswerLoss], base: Sequence[AnswerLoss], *, what: str) -> list[RowLoss]:
    """Sets the losses of two models side by side.

    Raises:
        UserError: A loss is not finite, or the two do not read the same tokens.
    """
    if [row.num_tokens for row in ours] != [row.num_tokens for row in base]:
        raise UserError(
            f"{what}: the tokenizer differs from that of the model in `retention.of:`, so their losses cannot be "
            "compared. Name the model that the alignment started from."
        )
    num_bad = sum(not math.isfinite(a.loss + b.loss) for a, b in zip(ours, base, strict=True))
    if num_bad:
        raise UserError(
            f"{what}: the loss of {num_bad} of {len(ours)} answers is not finite, so the weights are damaged. Train "
            "this model again, with a lower learning rate if it diverged."
        )
    return [RowLoss(a.num_tokens, a.loss, b.loss) for a, b in zip(ours, base, strict=True)]


def retention(rows: Sequence[RowLoss]) -> dict[str, Any]:
    """Mean loss per answer token of a model and its ratio to that of another, with a 95 % interval.

    The interval is the percentile one of a bootstrap over rows (Efron and Tibshirani 1993, section 13.3), each row with
    the losses of both models, from 2,000 samples of a fixed seed.

    Returns:
        `loss` and `base_loss` in nats per token, `ratio` with `low` and `high`, `num_rows` and `num_tokens`.
    """
    num_tokens = sum(row.num_tokens for row in rows)
    ours, base = np.array([row.loss for row in rows]), np.array([row.base_loss for row in rows])
    interval = bootstrap(
        (ours, base), _ratio, paired=True, vectorized=True, n_resamples=_RESAMPLES, method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    found = {
        "loss": ours.sum() / num_tokens, "base_loss": base.sum() / num_tokens, "ratio": _ratio(ours, base),
        "low": interval.low, "high": interval.high,
    }  # fmt: skip
    return {name: round(float(value), 4) for name, value in found.items()} | {
        "num_rows": len(rows), "num_tokens": num_tokens,
    }  # fmt: skip


def _ratio(ours: Any, base: Any, axis: int = -1) -> Any:
    return ours.sum(axis=axis) / base.sum(axis=axis)
