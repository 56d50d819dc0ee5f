"""The step that T-Vaccine and Vaccine share: find the worst perturbation, then train against it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tvac_plugin.activations import Fired, capture, frozen, perturb
from tvac_plugin.configs.base import RhoScope
from tvac_plugin.defenses.base import Batch, Host, StepReport
from tvac_plugin.prefix import SharedPrefix


class Gradients(NamedTuple):
    """Loss and its gradients at the outputs of some modules.

    Attributes:
        loss: Detached scalar.
        at: Gradient at each module's output, [batch, sequence, hidden].
    """

    loss: Tensor
    at: dict[int, Tensor]


def perturbed_step(
    host: Host,
    batch: Batch,
    modules: Mapping[int, nn.Module],
    *,
    rho: float,
    rho_scope: RhoScope,
    weights: Sequence[nn.Parameter],
    below: Sequence[nn.Module] = (),
    share: float = 1.0,
) -> StepReport:
    """One micro-batch of min over w of max over ||eps|| <= rho of L(w; e + eps), in two passes.

    Pass 1 finds the gradient at the modules' outputs; its graph begins at the lowest of them and holds no weight.
    Pass 2 trains with the outputs pushed uphill. Both see the same dropout masks.

    Args:
        host: Computes losses and runs backward.
        batch: Alignment data.
        modules: Layer index to the module whose output e_l is perturbed.
        rho: L2 radius of the perturbation.
        rho_scope: Whether the radius bounds the whole micro-batch or each sample.
        weights: All trainable parameters, none of which pass 1 needs a gradient of.
        below: The first layers of the decoder, if none of them is perturbed or learns; they run once.
        share: Share of the rows that is perturbed, the first ones; with less than all, pass 1 reads no others, sees
            dropout masks of its own, and runs the layers `below` itself.

    Raises:
        RuntimeError: A layer's perturbation never reached the forward pass.
    """
    num_rows = len(batch["labels"])
    num_perturbed = ceil(share * num_rows)
    prefix = SharedPrefix(below if num_perturbed == num_rows else ())
    with host.auxiliary(), frozen(weights), prefix.recorded():
        clean = gradients_at(modules, lambda: host.loss(_first_rows(batch, num_perturbed)))
    offsets = worst_perturbation(clean.at, rho=rho, rho_scope=rho_scope)
    clean.at.clear()  # as large as the offsets, and pass 2 is where memory peaks
    offsets = {key: _extended(offset, num_rows / num_perturbed) for key, offset in offsets.items()}
    with perturb(modules, offsets) as fired, prefix.replayed():
        loss = host.train(batch)
    refuse_unperturbed(modules, fired)
    return StepReport(
        loss=loss,
        losses={"clean_loss": clean.loss, "perturbed_loss": loss},
        norms={"perturbation_norm": joint_norm(offsets)},
        active_layers=tuple(sorted(modules)),
        num_fired=len(fired.counts),
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
    missing = sorted(set(modules) - set(fired.counts))
    if missing:
        raise RuntimeError(
            f"the perturbation never reached layers {missing}: something replaced their forward. "
            "Switch off compiled or fused kernels for these layers."
        )


def gradients_at(modules: Mapping[int, nn.Module], loss_of: Callable[[], Tensor]) -> Gradients:
    """Gradients of `loss_of()` at the outputs of `modules`; no parameter's gradient changes."""
    with capture(modules) as outputs:
        loss = loss_of()
        keys = sorted(outputs)
        gradients = torch.autograd.grad(loss, [outputs[key] for key in keys])
    return Gradients(loss.detach(), dict(zip(keys, gradients, strict=True)))


def worst_perturbation(gradients: Mapping[int, Tensor], *, rho: float, rho_scope: RhoScope) -> dict[int, Tensor]:
    """The perturbation of L2 norm `rho` that raises the loss most, to first order.

    eps_l = rho * g_l / sqrt(sum over j of ||g_j||^2), arXiv 2410.09760 and 2402.01109; with `rho_scope` "sample" the
    norms are taken for each sample of the batch alone. A zero or non-finite norm gives a zero perturbation.

    Args:
        gradients: Layer index to g_l, [batch, sequence, hidden].
        rho: L2 radius.
        rho_scope: "batch" or "sample".
    """
    squares = torch.stack([_squared_norm(g, rho_scope) for g in gradients.values()]).sum(dim=0)
    scale = rho / squares.sqrt()
    scale = torch.where(torch.isfinite(scale) & torch.isfinite(squares), scale, 0.0)
    return {
        key: torch.where(scale.to(g.device) > 0, g * scale.to(g.device, g.dtype), 0.0) for key, g in gradients.items()
    }


def joint_norm(tensors: Mapping[int, Tensor]) -> Tensor:
    """L2 norm over all `tensors` together."""
    return torch.stack([_squared_norm(t, "batch").sum() for t in tensors.values()]).sum().sqrt()


def _squared_norm(tensor: Tensor, rho_scope: RhoScope) -> Tensor:
    kept = 1 if rho_scope == "sample" else 0
    return precise(tensor).square().sum(dim=tuple(range(kept, tensor.ndim)), keepdim=True)


def precise(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
