"""The probe: how much, and in which direction, each layer's output matters to the loss on harmful data.

    d_l = dL(w; B_h) / de_l,    s_l = ||d_l||,    m_l = mean of d_l over the tokens of B_h

T-Vaccine draws layers by s_l; OASIS takes those with the largest s_l, and keeps its perturbation orthogonal to m_l.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tvac_plugin.defenses.base import Host
from tvac_plugin.defenses.budget import output_square, without_padding
from tvac_plugin.defenses.layer_draws import entropy
from tvac_plugin.defenses.two_pass import gradients_at
from tvac_plugin.model.hooks import frozen
from tvac_plugin.model.numerics import norm, precise
from tvac_plugin.model.types import Batch


class Probe(NamedTuple):
    """What one probe found, the same on all processes.

    Attributes:
        loss: Mean cross-entropy on the harmful batches.
        scores: s_l, [layers], in float64 on the CPU.
        output_norms: ||e_l|| without padding, likewise; empty unless asked for.
        directions: m_l / ||m_l||, [layers, hidden], zero where m_l is; empty unless asked for.
    """

    loss: float
    scores: Tensor
    output_norms: Tensor
    directions: Tensor

    def event(self, *, scores: Tensor, probabilities: Tensor) -> dict[str, Any]:
        """A line for the trace."""
        return {
            "event": "probe",
            "harmful_loss": self.loss,
            "scores": scores.tolist(),
            "probabilities": probabilities.tolist(),
            "entropy": entropy(probabilities),
        }


def says_nothing(scores: Tensor) -> bool:
    """Whether scores of layers are all zero, or one is not finite."""
    return not bool(torch.isfinite(scores).all() and scores.sum() > 0)


def probe_layers(
    host: Host,
    batch: Batch,
    modules: Mapping[int, nn.Module],
    *,
    weights: Sequence[nn.Parameter],
    output_norms: bool = False,
    directions: bool = False,
) -> Probe:
    """Probes all layers on a batch of harmful data; no parameter's gradient changes.

    Processes that probe n_r answer tokens each find what one that probes them all does: d_l is proportional to n_r
    times what process r finds at its tokens, so s_l^2 to the sum over r of (n_r * s_l,r)^2, and m_l to the sum of
    n_r times the sum over its tokens. The squared norm of an output is the sum of theirs.

    Args:
        host: Computes losses, and averages over processes.
        batch: This process's.
        modules: Layer index to the module with the output e_l.
        weights: All trainable parameters.
        output_norms: Whether these are asked for.
        directions: Whether these are.
    """
    square_of = output_square(batch, "batch") if output_norms else None
    with host.auxiliary(), frozen(weights):
        found = gradients_at(modules, host, lambda: host.mean_loss(batch), square_of=square_of)
    layers = sorted(modules)
    norms = torch.stack([norm([found.at[index]]) for index in layers])
    num_tokens = (batch["labels"][:, 1:] != -100).sum().to(norms.device, norms.dtype)
    sums = [_sum_over_tokens(found.at[index], batch).to(norms.device) for index in layers] if directions else []
    parts = [
        num_tokens.reshape(1),
        (num_tokens * found.loss).reshape(1),
        (num_tokens * norms).square(),
        *(found.squares[index].reshape(1) for index in sorted(found.squares)),
        *(num_tokens * total for total in sums),
    ]
    means = host.mean_across_processes(torch.cat(parts))
    head = 2 + len(norms) + len(found.squares)
    mean_tokens, mean_loss, *squares = means[:head].cpu().double()
    return Probe(
        loss=(mean_loss / mean_tokens).item(),
        scores=torch.stack(squares[: len(norms)]).sqrt() / mean_tokens,
        output_norms=torch.stack(squares[len(norms) :]).sqrt() if found.squares else torch.zeros(0),
        directions=_unit(means[head:].reshape(len(layers), -1)) if directions else torch.zeros(0),
    )


def _sum_over_tokens(gradient: Tensor, batch: Batch) -> Tensor:
    """Of d_l, [batch, sequence, hidden]; [hidden]."""
    return precise(without_padding(gradient, batch)).sum(dim=(0, 1))


def _unit(vectors: Tensor) -> Tensor:
    """The rows with length 1; zero stays zero."""
    lengths = vectors.norm(dim=-1, keepdim=True)
    return torch.where(lengths > 0, vectors / lengths, 0.0)
