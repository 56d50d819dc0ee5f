"""The step of LoX on one weight (arXiv 2506.15606), dense and on the factors of a LoRA.

With ΔW = W_aligned - W_base = U S Vᵀ and its safety subspace U_k, the first k left singular vectors:

    W_LoX = W_base + ΔW + c · U_k U_kᵀ ΔW,    U_k U_kᵀ ΔW = U_k S_k V_kᵀ = ΔW V_k V_kᵀ

k = 6 and c = 1.25 are the values reported of the paper's LLaMA-2-7B aligned on 65.6k pairs; k = 3 is reported of its
other models, where k is the least rank whose truncated ΔW is as safe as ΔW. Both were read in reproductions: to be
checked against the paper.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tvac_plugin.boundary.errors import UserError


def extrapolate(delta: Tensor, *, rank: int, coefficient: float) -> Tensor:
    """Returns ΔW + c · truncate_k(ΔW), computed in float64 and returned in the dtype of `delta`.

    The singular vectors come from the eigenvectors of the smaller Gram matrix, ΔWᵀ ΔW or ΔW ΔWᵀ, which takes less
    memory and time than the whole decomposition and gives the same projection.

    Args:
        delta: ΔW, `[out, in]`.
        rank: k; from the rank of ΔW on, the result is (1 + c) ΔW.
        coefficient: c.

    Raises:
        UserError: A setting is out of range, `delta` is not a finite matrix, or the result does not fit its dtype.
    """
    check_settings(rank, coefficient)
    change = _finite_matrix(delta, "the change")
    if rank >= min(change.shape):
        return _rounded((1 + coefficient) * change, delta.dtype)
    is_tall = change.shape[0] >= change.shape[1]
    gram = change.T @ change if is_tall else change @ change.T
    top = torch.linalg.eigh(gram).eigenvectors[:, -rank:]
    truncated = (change @ top) @ top.T if is_tall else top @ (top.T @ change)
    return _rounded(change + coefficient * truncated, delta.dtype)


def extrapolate_factors(a: Tensor, b: Tensor, *, rank: int, coefficient: float) -> tuple[Tensor, Tensor]:
    """Returns factors whose product is BA + c · truncate_k(BA), without forming BA.

    With the thin decompositions B = Q_b R_b and Aᵀ = Q_a R_a, the left singular vectors of BA are Q_b times those of
    the r x r matrix R_b R_aᵀ. As truncate_k(BA) = U_k U_kᵀ B A, A stays as it is and B becomes B + c U_k U_kᵀ B.

    Args:
        a: A, `[r, in]`.
        b: B, `[out, r]`.
        rank: k; from the rank of BA on, the product is (1 + c) BA.
        coefficient: c.

    Returns:
        A itself and the new B, in the shape and dtype of `b`.

    Raises:
        UserError: A setting is out of range, a factor is not a finite matrix, they do not fit, or the new B does not
            fit its dtype.
    """
    check_settings(rank, coefficient)
    first, second = _finite_matrix(a, "A"), _finite_matrix(b, "B")
    if first.shape[0] != second.shape[1]:
        raise UserError(f"A is {list(a.shape)} and B is {list(b.shape)}. Give A as [r, in] and B as [out, r].")
    basis, core_b = torch.linalg.qr(second)
    core_a = torch.linalg.qr(first.T).R
    top = basis @ torch.linalg.svd(core_b @ core_a.T, full_matrices=False).U[:, :rank]
    return a, _rounded(second + coefficient * (top @ (top.T @ second)), b.dtype)


def extrapolate_weight(aligned: Tensor, base: Tensor, *, rank: int, coefficient: float) -> Tensor:
    """Returns W_LoX, `[out, in]`, in the dtype of `aligned`; a weight that alignment left alone stays as it is.

    Raises:
        UserError: As `extrapolate`.
    """
    origin = base.double()
    delta = aligned.double() - origin
    if not delta.any():
        return aligned
    return _rounded(origin + extrapolate(delta, rank=rank, coefficient=coefficient), aligned.dtype)


def check_settings(rank: int, coefficient: float) -> None:
    """Accepts a rank of at least 1 and a finite coefficient of at least 0.

    Raises:
        UserError: One of them is something else.
    """
    if rank < 1:
        raise UserError(f"rank: {rank} singular vectors cannot be kept. Set it to 1 or more.")
    if not math.isfinite(coefficient) or coefficient < 0:
        raise UserError(f"coefficient: {coefficient} would not strengthen the alignment. Set it to 0 or more.")


def _finite_matrix(tensor: Tensor, name: str) -> Tensor:
    if tensor.ndim != 2:
        raise UserError(f"{name} is {list(tensor.shape)}, not a matrix. Give a 2-D weight.")
    if not tensor.isfinite().all():
        raise UserError(f"{name} has values that are not finite. Align the model again.")
    return tensor.double()


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = value.to(dtype)
    if not rounded.isfinite().all():
        raise UserError(f"a value grew beyond {dtype}. Lower the coefficient.")
    return rounded
