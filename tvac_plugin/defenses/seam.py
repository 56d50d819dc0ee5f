"""SEAM (Wang et al., arXiv 2505.12186): learning harm is coupled to unlearning all else.

    L = L(w; B) + alpha * CE_m(x_s) - log(1 + A) + beta * cos(g_a, g_b)

    g_a = grad CE_m(x_h), the attacker's gradient;  g_b = grad CE(benign rows);  m, x_h, x_s and A as in RepNoise

The gradient of the cosine needs products of Hessians with vectors. Each is the change of a gradient along a short step:

    every optimizer step    c   = cos(g_a, g_b)
                            D_a = g_a(w + e * (g_b / |g_b| - c * g_a / |g_a|)) - g_a(w)          on the same batch
                            D_b = g_b(w + e * (g_a / |g_a| - c * g_b / |g_b|)) - g_b(w)          on the same batch
                            grad cos = (D_a / |g_a| + D_b / |g_b|) / e
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tvac_plugin.configs.base import LEAST
from tvac_plugin.configs.collapse import SEAMConfig
from tvac_plugin.defenses.base import Defense, Host, Position, StepReport, trainable
from tvac_plugin.defenses.rep_noise import cross_entropy_at_all_depths, masked_cross_entropy
from tvac_plugin.model.logit_lens import Readout
from tvac_plugin.model.numerics import norm, precise
from tvac_plugin.model.types import Batch, Pair
from tvac_plugin.model.weights import combined, finite, move, restored

Gradient = list[Tensor]


class SEAM(Defense):
    """Turns the harmful and the benign gradient against each other; six gradients per optimizer step."""

    config_class = SEAMConfig

    def __init__(self, config: SEAMConfig, model: nn.Module, *, seed: int) -> None:
        """Binds the defense to the trainable weights of `model`; `seed` is unused, the batches are seeded.

        Raises:
            UserError: The model has no norm before its head.
        """
        self._config = config
        self._weights = trainable(model)
        self._readout = Readout(model, reader=config.block)

    def step(self, host: Host, batch: Batch, position: Position) -> StepReport:
        """Adds the gradient on one batch of pairs and benign rows at the start of an optimizer step, then trains."""
        losses: dict[str, Tensor] = {}
        norms: dict[str, Tensor] = {}
        effect = None
        if position.starts_step:
            pair = host.pair("pairs", position.step)
            gradient, losses = self._unlearning(host, pair)
            norms = {"regularizer_norm": norm(gradient)}
            if self._config.self_destruct_scale > 0:
                coupling, cosine = self._self_destruct(host, pair, host.batch("benign", position.step))
                gradient = combined((1.0, gradient), (1.0, coupling))
                losses |= {"self_destruct_loss": cosine}
                norms["self_destruct_norm"] = norm(coupling)
            if self._config.self_destruct_scale >= LEAST:
                effect = norms["self_destruct_norm"]  # rounding can take the steps behind it away
            host.add_gradients(self._weights, gradient)
        return StepReport(loss=host.train(batch), losses=losses, norms=norms, effect=effect)

    def _unlearning(self, host: Host, pair: Pair) -> tuple[Gradient, dict[str, Tensor]]:
        """Gradient of alpha * CE_m(x_s) - log(1 + A), and both losses."""
        with host.auxiliary():
            loss, parts = self._unlearning_loss(host, pair)
            gradient = finite(host.gradients(loss, self._weights))
        return gradient, {name: part.detach() for name, part in parts.items()}

    def _unlearning_loss(self, host: Host, pair: Pair) -> tuple[Tensor, dict[str, Tensor]]:
        harmful, refusal = pair
        outputs = host.outputs(harmful, hidden_states=True)
        self._readout.check(outputs)
        ascent = cross_entropy_at_all_depths(self._readout, outputs, harmful, _differ(pair))
        refused = masked_cross_entropy(host.outputs(refusal).logits, refusal, _differ(pair))
        loss = self._config.refusal_scale * refused - self._config.unlearning_scale * torch.log1p(ascent)
        return loss, {"refusal_loss": refused, "harmful_loss": ascent}

    def _attack_loss(self, host: Host, pair: Pair) -> Tensor:
        """CE_m(x_h), which an attacker lowers."""
        return masked_cross_entropy(host.outputs(pair[0]).logits, pair[0], _differ(pair))

    def _self_destruct(self, host: Host, pair: Pair, benign: Batch) -> tuple[Gradient, Tensor]:
        """Beta * grad cos(g_a, g_b), and the cosine; the weights are as before."""
        beta, e = self._config.self_destruct_scale, self._config.probe_step_size

        def attack() -> Tensor:
            return self._attack_loss(host, pair)

        def serve() -> Tensor:
            return host.mean_loss(benign)

        g_a, g_b = self._gradient(host, attack), self._gradient(host, serve)
        length_a, length_b = norm(g_a), norm(g_b)
        u_a, u_b = _divided(g_a, length_a), _divided(g_b, length_b)
        c = _inner(u_a, u_b)
        d_a = self._change(host, attack, g_a, along=_without(u_b, u_a, c))
        d_b = self._change(host, serve, g_b, along=_without(u_a, u_b, c))
        return finite(combined((beta / e, _divided(d_a, length_a)), (beta / e, _divided(d_b, length_b)))), c

    def _change(self, host: Host, loss_of: Callable[[], Tensor], gradient: Gradient, *, along: Gradient) -> Gradient:
        """How a gradient changes by a step of e along a direction; both see the same dropout masks."""
        with restored(self._weights):
            move(self._weights, along, torch.tensor(self._config.probe_step_size, dtype=torch.float64))
            return combined((1.0, self._gradient(host, loss_of)), (-1.0, gradient))

    def _gradient(self, host: Host, loss_of: Callable[[], Tensor]) -> Gradient:
        with host.auxiliary():
            return host.gradients(loss_of(), self._weights)


def _differ(pair: Pair) -> Tensor:
    """The tokens at which harmful answer and refusal differ, [batch, sequence]."""
    harmful, refusal = pair
    differ: Tensor = harmful["input_ids"] != refusal["input_ids"]
    return differ


def _inner(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    products = [(precise(a) * precise(b)).sum() for a, b in zip(first, second, strict=True)]
    inner: Tensor = torch.stack([product.to(products[0].device) for product in products]).sum()
    return inner


def _divided(gradient: Sequence[Tensor], length: Tensor) -> Gradient:
    return [part / length.to(part.device, part.dtype) for part in gradient]


def _without(direction: Sequence[Tensor], other: Sequence[Tensor], cosine: Tensor) -> Gradient:
    """A unit vector minus its part along another one."""
    return [d - cosine.to(o.device, o.dtype) * o for d, o in zip(direction, other, strict=True)]
