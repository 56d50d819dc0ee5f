"""Circuit breakers by representation rerouting (Zou et al., arXiv 2406.04313, Algorithm 1).

    every optimizer step t = 1 .. T    c_s = alpha * (1 - t / 2T)        c_r = r * alpha * t / 2T
                                       L_s = mean of relu(cos(h', h))    over chosen layers and harmful answer tokens
                                       L_r = mean of ||b' - b||          over all depths and benign tokens
                                       update w with  grad L(w; B) + c_s * grad L_s + c_r * grad L_r

h' and b' are hidden states with the adapter, h and b those of the same tokens without it. L(w; B) is the loss on the
alignment batch, which the paper does not train; r, 1 in the paper, weighs retaining.

Where h' is still h, as under a new adapter, the cosine is at its maximum and L_s has no gradient. There it is taken a
thousandth of ||h|| away from h, in a seeded direction; the published code starts from rounding errors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tvac_plugin.configs.representations import CircuitBreakerConfig
from tvac_plugin.defenses.base import Defense, Host, Position, StepReport
from tvac_plugin.defenses.paired import PairedModel, answer_mask, masked_mean
from tvac_plugin.defenses.tar import mean_distance
from tvac_plugin.model.numerics import norm, seed_of
from tvac_plugin.model.types import Batch
from tvac_plugin.model.weights import combined, finite

_NEAR = 1e-3


class CircuitBreaker(Defense):
    """Reroutes the states of harmful answers; four forward and two backward passes more per optimizer step."""

    config_class = CircuitBreakerConfig

    def __init__(self, config: CircuitBreakerConfig, model: nn.Module, *, seed: int) -> None:
        """Binds the defense to the adapter of `model`; the first direction depends on `seed`, the layer and the batch.

        Raises:
            UserError: The model without its adapter is not what it was before training, or has not these layers.
        """
        self._config = config
        self._seed = seed
        self._paired = PairedModel(model, config)

    def step(self, host: Host, batch: Batch, position: Position) -> StepReport:
        """Adds both gradients at the start of an optimizer step, then trains as usual."""
        losses: dict[str, Tensor] = {}
        norms: dict[str, Tensor] = {}
        effect = None
        if position.starts_step:
            reroute_scale, retain_scale = scales(self._config, position)
            harmful = host.batch("harmful", position.step)
            benign = host.batch("benign", position.step) if host.has("benign") else batch
            rerouting, reroute_loss = self._reroute(host, harmful, host.number(position.step))
            retaining, retain_loss = self._retain(host, benign)
            host.add_gradients(self._paired.weights, combined((reroute_scale, rerouting), (retain_scale, retaining)))
            losses = {"reroute_loss": reroute_loss, "retain_loss": retain_loss}
            norms = {"reroute_norm": reroute_scale * norm(rerouting), "retain_norm": retain_scale * norm(retaining)}
            effect = torch.where(is_rerouted(reroute_loss, harmful), 1.0, norms["reroute_norm"])
        return StepReport(loss=host.train(batch), losses=losses, norms=norms, effect=effect)

    def _reroute(self, host: Host, harmful: Batch, number: int) -> tuple[list[Tensor], Tensor]:
        """Gradient of L_s, and L_s."""
        now, before = self._paired(host, harmful).states(self._paired.layers)
        cosines = F.cosine_similarity(self._off_the_maximum(now, before, number), before, dim=-1)
        loss = masked_mean(cosines.relu(), answer_mask(harmful))
        return finite(host.gradients(loss, self._paired.weights)), loss.detach()

    def _retain(self, host: Host, benign: Batch) -> tuple[list[Tensor], Tensor]:
        """Gradient of L_r, and L_r."""
        paired = self._paired(host, benign)
        loss = mean_distance(paired.now.hidden_states, paired.before.hidden_states, benign)
        return finite(host.gradients(loss, self._paired.weights)), loss.detach()

    def _off_the_maximum(self, now: Tensor, before: Tensor, number: int) -> Tensor:
        """The states h', [layers, batch, sequence, hidden], moved away from h where they are still there."""
        generator = torch.Generator(now.device).manual_seed(seed_of(self._seed, number))
        direction = torch.randn(now.shape, generator=generator, device=now.device, dtype=now.dtype)
        away = _NEAR * torch.linalg.vector_norm(before, dim=-1, keepdim=True)
        is_there = torch.linalg.vector_norm(now.detach() - before, dim=-1, keepdim=True) < away
        return now + torch.where(is_there, away * F.normalize(direction, dim=-1), 0.0)


def scales(config: CircuitBreakerConfig, position: Position) -> tuple[float, float]:
    """c_s and c_r at an optimizer step; of a training of unknown length every step counts as the last."""
    progress = (position.step + 1) / (2 * max(position.num_steps, position.step + 1))
    return config.alpha * (1 - progress), config.alpha * config.retain_scale * progress


def is_rerouted(loss: Tensor, harmful: Batch) -> Tensor:
    """Whether all harmful states are at right angles to what they were, or further, so that nothing is left to do."""
    return (loss == 0) & answer_mask(harmful).any().to(loss.device)
