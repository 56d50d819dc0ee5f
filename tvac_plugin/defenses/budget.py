"""The budget of a perturbation: what `rho` bounds, and the perturbation that spends it best.

With g_l the gradient of the loss at the output o_l of layer l, adding eps raises the loss by sum over l of <g_l, eps_l>
to first order.

    absolute    budget  sqrt(sum over l of ||eps_l||^2) <= rho
                best    eps_l = rho * g_l / sqrt(sum over j of ||g_j||^2)
    relative    budget  sqrt(sum over l of (||eps_l|| / ||o_l||)^2) <= rho
                best    eps_l = rho * ||o_l||^2 * g_l / sqrt(sum over j of ||o_j||^2 * ||g_j||^2)

The first is arXiv 2410.09760 and 2402.01109. The second follows from it: with v_l = eps_l / ||o_l|| the budget is
||v|| <= rho and the rise is sum_l <||o_l|| * g_l, v_l>, so by Cauchy and Schwarz the best v_l is rho * ||o_l|| * g_l
over the norm of all ||o_j|| * g_j together. Where all ||o_l|| are the same c, it is the first with a radius of c * rho.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tvac_plugin.configs.base import RhoScope
from tvac_plugin.model.numerics import precise
from tvac_plugin.model.types import Batch


def worst_perturbation(
    gradients: Mapping[int, Tensor],
    *,
    rho: float,
    rho_scope: RhoScope,
    output_squares: Mapping[int, Tensor] | None = None,
) -> dict[int, Tensor]:
    """The perturbation within the budget `rho` that raises the loss most, to first order.

    With `rho_scope` "sample" the norms are taken for each sample of the batch alone. A zero or non-finite norm gives a
    zero perturbation.

    Args:
        gradients: Layer index to g_l, [batch, sequence, hidden].
        rho: The budget.
        rho_scope: "batch" or "sample".
        output_squares: Layer index to ||o_l||^2 over the same scope, which makes the budget relative; none or empty
            for the absolute one.
    """
    weights = output_squares or {}
    squares = {key: _squared_norm(g, rho_scope) for key, g in gradients.items()}
    weighted = [square * weights[key] if weights else square for key, square in squares.items()]
    total = torch.stack(weighted).sum(dim=0)
    scale = rho / total.sqrt()
    scale = torch.where(torch.isfinite(scale) & torch.isfinite(total), scale, 0.0)
    if not weights:
        return {key: _scaled(g, scale) for key, g in gradients.items()}
    return {key: _scaled(precise(g), scale * weights[key]).to(g.dtype) for key, g in gradients.items()}


def _scaled(gradient: Tensor, scale: Tensor) -> Tensor:
    scale = scale.to(gradient.device)
    return torch.where(scale > 0, gradient * scale.to(gradient.dtype), 0.0)


def joint_share(offsets: Mapping[int, Tensor], output_squares: Mapping[int, Tensor], rho_scope: RhoScope) -> Tensor:
    """sqrt(sum over l of (||eps_l|| / ||o_l||)^2), and over samples too with `rho_scope` "sample"; a scalar.

    Args:
        offsets: Layer index to eps_l, [batch, sequence, hidden].
        output_squares: Layer index to ||o_l||^2 over the same scope.
        rho_scope: "batch" or "sample".
    """
    squares = [_squared_norm(offset, rho_scope) / output_squares[key] for key, offset in offsets.items()]
    return torch.stack([torch.where(square > 0, square, 0.0).sum() for square in squares]).sum().sqrt()


def output_square(batch: Batch, rho_scope: RhoScope) -> Callable[[Tensor], Tensor]:
    """What takes the squared norm of an output for `batch`, [batch, sequence, hidden], padding left out.

    It returns [1, 1, 1], or [batch, 1, 1] with `rho_scope` "sample". Where the batch does not say what is padding, as
    with packed rows, all tokens count.
    """

    def square(hidden: Tensor) -> Tensor:
        return _squared_norm(without_padding(hidden, batch), rho_scope)

    return square


def without_padding(states: Tensor, batch: Batch) -> Tensor:
    """`states`, [batch, sequence, hidden], zero where `batch` says that there is padding."""
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != states.shape[:2]:
        return states
    return torch.where((mask != 0).unsqueeze(-1).to(states.device), states, 0.0)


def _squared_norm(tensor: Tensor, rho_scope: RhoScope) -> Tensor:
    kept = 1 if rho_scope == "sample" else 0
    return precise(tensor).square().sum(dim=tuple(range(kept, tensor.ndim)), keepdim=True)
