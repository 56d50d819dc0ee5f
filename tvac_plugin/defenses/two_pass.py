"""The step that T-Vaccine, Vaccine and OASIS share: find the worst perturbation, then train against it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tvac_plugin.configs.base import RhoScale, RhoScope
from tvac_plugin.defenses.base import Host, StepReport
from tvac_plugin.defenses.budget import joint_share, output_square, worst_perturbation
from tvac_plugin.model.hooks import Fired, capture, frozen, perturb
from tvac_plugin.model.numerics import norm
from tvac_plugin.model.shared_prefix import SharedPrefix
from tvac_plugin.model.types import Batch

Worst = Callable[[Mapping[int, Tensor]], dict[int, Tensor]]
"""From gradients at the modules' outputs to the worst perturbation within the budget, both by layer."""


class Gradients(NamedTuple):
    """Loss and its gradients at the outputs of some modules.

    Attributes:
        loss: Detached scalar.
        at: Gradient at each module's output, [batch, sequence, hidden].
        squares: Squared norm of each module's output, if asked for; [1, 1, 1], or [batch, 1, 1] by sample.
    """

    loss: Tensor
    at: dict[int, Tensor]
    squares: dict[int, Tensor]


def perturbed_step(
    host: Host,
    batch: Batch,
    modules: Mapping[int, nn.Module],
    *,
    rho: float,
    rho_scope: RhoScope,
    rho_scale: RhoScale = "absolute",
    weights: Sequence[nn.Parameter],
    below: Sequence[nn.Module] = (),
    share: float = 1.0,
    choose: Callable[[Mapping[int, Tensor], Worst], dict[int, Tensor]] | None = None,
) -> StepReport:
    """One micro-batch of min over w of max over ||eps|| <= rho of L(w; e + eps), in two passes.

    With `rho_scale` "relative" the maximum is over sqrt(sum over l of (||eps_l|| / ||e_l||)^2) <= rho.

    Pass 1 finds the gradient at the modules' outputs; its graph begins at the lowest of them and holds no weight.
    Pass 2 trains with the outputs pushed uphill. Both see the same dropout masks.

    Args:
        host: Computes losses and runs backward.
        batch: Alignment data.
        modules: Layer index to the module whose output e_l is perturbed.
        rho: L2 radius of the perturbation.
        rho_scope: Whether the radius bounds the whole micro-batch or each sample.
        rho_scale: Whether the radius is a norm, or a share of the outputs' norms.
        weights: All trainable parameters, none of which pass 1 needs a gradient of.
        below: The first layers of the decoder, if none of them is perturbed or learns; they run once.
        share: Share of the rows that is perturbed, the first ones; with less than all, pass 1 reads no others, sees
            dropout masks of its own, and runs the layers `below` itself.
        choose: Makes the perturbation, by layer, of the gradients and of what finds the worst one; by default the
            worst one itself. Zero where it leaves nothing.

    Raises:
        RuntimeError: A layer's perturbation never reached the forward pass.
    """
    num_rows = len(batch["labels"])
    num_perturbed = ceil(share * num_rows)
    prefix = SharedPrefix(below if num_perturbed == num_rows else ())
    rows = _first_rows(batch, num_perturbed)
    square_of = output_square(rows, rho_scope) if rho_scale == "relative" else None
    with host.auxiliary(), frozen(weights), prefix.recorded():
        clean = gradients_at(modules, host, lambda: host.loss(rows, of=batch), square_of=square_of)

    def worst(gradients: Mapping[int, Tensor]) -> dict[int, Tensor]:
        return worst_perturbation(gradients, rho=rho, rho_scope=rho_scope, output_squares=clean.squares)

    offsets = worst(clean.at) if choose is None else choose(clean.at, worst)
    clean.at.clear()  # as large as the offsets, and pass 2 is where memory peaks
    shares = {} if square_of is None else {"relative_perturbation_norm": joint_share(offsets, clean.squares, rho_scope)}
    offsets = {key: _extended(offset, num_rows / num_perturbed) for key, offset in offsets.items()}
    with perturb(modules, offsets) as fired, prefix.replayed():
        loss = host.train(batch)
    refuse_unperturbed(modules, fired)
    return StepReport(
        loss=loss,
        losses={"clean_loss": clean.loss, "perturbed_loss": loss},
        norms={
            name: fired.norm(length)
            for name, length in ({"perturbation_norm": norm(list(offsets.values()))} | shares).items()
        },
        active_layers=tuple(sorted(modules)),
        num_fired=len(fired.changed),
    )


def _first_rows(batch: Batch, count: int) -> Batch:
    num_rows = len(batch["labels"])
    return {
        name: value[:count] if isinstance(value, Tensor) and value.ndim and len(value) == num_rows else value
        for name, value in batch.items()
    }


def _extended(offset: Tensor, factor: float) -> Tensor:
    """The offset with zeros for the rows that are not perturbed."""
    missing = round(len(offset) * factor) - len(offset)
    return torch.cat([offset, offset.new_zeros(missing, *offset.shape[1:])]) if missing else offset


def refuse_unperturbed(modules: Mapping[int, nn.Module], fired: Fired) -> None:
    """Raises `RuntimeError` if the perturbation of any of `modules` never reached the forward pass."""
    missing = sorted(set(modules) - set(fired.changed))
    if missing:
        raise RuntimeError(
            f"the perturbation never reached layers {missing}: something replaced their forward. "
            "Switch off compiled or fused kernels for these layers."
        )


def gradients_at(
    modules: Mapping[int, nn.Module],
    host: Host,
    loss_of: Callable[[], Tensor],
    *,
    square_of: Callable[[Tensor], Tensor] | None = None,
) -> Gradients:
    """Gradients of `loss_of()` at the outputs of `modules`; no parameter's gradient changes.

    Args:
        modules: Layer index to module.
        host: Differentiates.
        loss_of: Runs the model.
        square_of: The squared norm of an output, if it is asked for.
    """
    with capture(modules) as outputs:
        loss = loss_of()
        keys = sorted(outputs)
        gradients = host.output_gradients(loss, [outputs[key] for key in keys])
    squares = {} if square_of is None else {key: square_of(outputs[key].detach()) for key in keys}
    return Gradients(loss.detach(), dict(zip(keys, gradients, strict=True)), squares)
