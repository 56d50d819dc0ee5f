"""CRL, contrastive representation learning with triplets (Simko et al., arXiv 2506.11938).

    every optimizer step    c   = mean of h' over the answer tokens of a harmful batch
                            L_b = mean of relu(d(b', b) - d(b', c) + m_b)    over layers and benign answer tokens
                            L_h = mean of relu(d(h', c) - d(h', h) + m_h)    over layers and harmful answer tokens
                            K   = T^2 * mean of KL(p || p')                  over benign tokens
                            update w with  grad [ L(w; B) + alpha * L_b + beta * L_h + gamma * K ]

h' and b' are hidden states with the adapter, h and b those of the same tokens without it; p' and p are the predictions
with and without it at temperature T. d is the cosine distance, 1 - cos. L(w; B) is the loss on the alignment batch,
which the paper does not train.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tvac_plugin.configs.representations import CRLConfig
from tvac_plugin.defenses.base import Defense, Host, Position, StepReport
from tvac_plugin.defenses.paired import Paired, PairedModel, answer_mask, centre, masked_mean
from tvac_plugin.model.numerics import norm, precise
from tvac_plugin.model.types import Batch
from tvac_plugin.model.weights import finite


class CRL(Defense):
    """Gathers the states of harmful answers away from where they were; four forward and one backward pass more."""

    config_class = CRLConfig

    def __init__(self, config: CRLConfig, model: nn.Module, *, seed: int) -> None:
        """Binds the defense to the adapter of `model`; `seed` is unused, the batches are seeded.

        Raises:
            UserError: The model without its adapter is not what it was before training, or has not these layers.
        """
        self._config = config
        self._paired = PairedModel(model, config)

    def step(self, host: Host, batch: Batch, position: Position) -> StepReport:
        """Adds the triplets' gradient at the start of an optimizer step, then trains as usual."""
        losses: dict[str, Tensor] = {}
        norms: dict[str, Tensor] = {}
        effect = None
        if position.starts_step:
            harmful = host.batch("harmful", position.step)
            benign = host.batch("benign", position.step) if host.has("benign") else batch
            loss, losses = self._loss(host, harmful, benign)
            gradients = finite(host.gradients(loss, self._paired.weights))
            host.add_gradients(self._paired.weights, gradients)
            norms = {"regularizer_norm": norm(gradients)}
            effect = self._effect(norms["regularizer_norm"], losses["triplet_harmful_loss"], harmful)
        return StepReport(loss=host.train(batch), losses=losses, norms=norms, effect=effect)

    def _loss(self, host: Host, harmful: Batch, benign: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Alpha * L_b + beta * L_h + gamma * K, and its parts."""
        config, layers = self._config, self._paired.layers
        h_now, h_before = self._paired(host, harmful).states(layers)
        benign_pair = self._paired(host, benign)
        b_now, b_before = benign_pair.states(layers)
        c = centre(host, h_now, answer_mask(harmful))
        kept = F.relu(distance(b_now, b_before) - distance(b_now, c) + config.benign_margin)
        gathered = F.relu(distance(h_now, c) - distance(h_now, h_before) + config.harmful_margin)
        parts = {
            "triplet_benign_loss": masked_mean(kept, answer_mask(benign)),
            "triplet_harmful_loss": masked_mean(gathered, answer_mask(harmful)),
            "kl_loss": divergence(benign_pair, benign, config.kl_temperature),
        }
        scales = (config.benign_scale, config.harmful_scale, config.kl_scale)
        total = torch.stack([scale * part for scale, part in zip(scales, parts.values(), strict=True)]).sum()
        return total, {name: part.detach() for name, part in parts.items()}

    def _effect(self, added: Tensor, harmful_loss: Tensor, harmful: Batch) -> Tensor:
        """What was added; nothing without harmful answers, and 1 where these are all where they should be."""
        has_answers = answer_mask(harmful).any().to(added.device)
        return torch.where(has_answers, torch.where(harmful_loss == 0, 1.0, added), 0.0)


def distance(x: Tensor, y: Tensor) -> Tensor:
    """Cosine distance between states, [..., hidden] each; [...]."""
    return 1 - F.cosine_similarity(x, y, dim=-1)


def divergence(pair: Paired, batch: Batch, temperature: float) -> Tensor:
    """T^2 times the mean divergence of the predictions with the adapter from those without, padding left out.

    Packed rows come without an attention mask; all their tokens count.
    """
    mask = batch.get("attention_mask")
    kept = (torch.ones_like(batch["input_ids"]) if mask is None else mask).to(pair.now.logits.device) != 0
    now, before = ((precise(side.logits[kept]) / temperature).log_softmax(-1) for side in pair)
    return temperature**2 * F.kl_div(now, before, reduction="batchmean", log_target=True)
