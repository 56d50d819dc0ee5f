"""Booster (Huang et al., arXiv 2409.01586): a harmful step should lower the harmful loss as little as possible.

    min over w of  f(w) + lambda * [ h(w) - h(w - alpha * grad h(w) / ||grad h(w)||) ]          (equation 1)

f is the loss on alignment data, h on harmful data. As in the paper the Hessian is dropped (equation 3):

    every optimizer step    g_h  = grad h(w)                      on one harmful batch
                            w'   = w - alpha * g_h / ||g_h||
                            g_h' = grad h(w')                     on the same batch
                            update w with  grad f(w) + lambda * (g_h - g_h')
"""

from __future__ import annotations

from torch import Tensor, nn

from tvac_plugin.configs.unlearning import BoosterConfig
from tvac_plugin.defenses.base import Defense, Host, Position, StepReport, trainable
from tvac_plugin.model.numerics import norm
from tvac_plugin.model.types import Batch
from tvac_plugin.model.weights import combined, finite, move, restored

_TINY = 1e-7


class Booster(Defense):
    """Attenuates harmful perturbation; three gradients per optimizer step."""

    config_class = BoosterConfig

    def __init__(self, config: BoosterConfig, model: nn.Module, *, seed: int) -> None:
        """Binds the defense to the trainable weights of `model`; `seed` is unused, the batches are seeded."""
        self._config = config
        self._weights = trainable(model)

    def step(self, host: Host, batch: Batch, position: Position) -> StepReport:
        """Adds the regularizer's gradient at the start of an optimizer step, then trains as usual."""
        losses: dict[str, Tensor] = {}
        norms: dict[str, Tensor] = {}
        if position.starts_step:
            regularizer, losses = self._regularizer(host, host.batch("harmful", position.step))
            host.add_gradients(self._weights, regularizer)
            norms = {"regularizer_norm": norm(regularizer)}
        return StepReport(loss=host.train(batch), losses=losses, norms=norms)

    def _regularizer(self, host: Host, harmful: Batch) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Lambda * (g_h - g_h'), and the two losses; the weights are as before."""
        scale, alpha = self._config.regularizer_scale, self._config.harmful_step_size
        before, g = self._harmful_gradient(host, harmful)
        with restored(self._weights):
            move(self._weights, g, -alpha / (norm(g) + _TINY))
            after, g_after = self._harmful_gradient(host, harmful)
        losses = {"harmful_loss": before, "harmful_loss_after_step": after}
        return finite(combined((scale, g), (-scale, g_after))), losses

    def _harmful_gradient(self, host: Host, harmful: Batch) -> tuple[Tensor, list[Tensor]]:
        with host.auxiliary():
            loss = host.mean_loss(harmful)
            return loss.detach(), host.gradients(loss, self._weights)
