"""Tensors that have shapes and no data, and what to answer where a program looks at data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_READ_NUMBER = _aten._local_scalar_dense.default
_DEVICE = torch.ops.prim.device.default
_SELECT = _aten.index.Tensor
_MULTIPLY_4BIT = "bitsandbytes::gemm_4bit"


@contextmanager
def imagined(mode: FakeTensorMode, *inner: TorchDispatchMode, answer_share: float = 1.0) -> Iterator[None]:
    """Inside it all tensors are fake; each operation is seen by the `inner` modes as well.

    Transformers builds masks for export when it sees fake tensors, which a training step on real ones does not do.
    """
    with ExitStack() as stack:
        stack.enter_context(patch("transformers.masking_utils.is_tracing", lambda _tensor=None: False))
        for each in (mode, *inner, _Imagination(answer_share)):
            stack.enter_context(each)
        yield


class _Imagination(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers for the data that fake tensors do not have.

    A number read from a tensor is 1, a truth value true: nothing is padded, no gradient is infinite. A boolean mask
    selects the tokens that have a label: the same share of every row, whose first token can have none.
    """

    def __init__(self, answer_share: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._answer_share = answer_share

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:  # asked thousands of times a step
            return args[0].fake_device
        if func is _READ_NUMBER:
            return _one(args[0].dtype)
        if func is _SELECT and _is_mask(args[1]):
            mask = args[1][0]
            return args[0].new_empty((self._num_selected(mask), *args[0].shape[mask.ndim :]))
        if func.name() == _MULTIPLY_4BIT:
            return _multiply_4bit(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _num_selected(self, mask: Tensor) -> int:
        return int(mask.numel() // mask.shape[-1] * round(self._answer_share * (mask.shape[-1] - 1)))


def _one(dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


def _is_mask(indices: list[Tensor | None]) -> bool:
    return len(indices) == 1 and indices[0] is not None and indices[0].dtype == torch.bool


def _multiply_4bit(x: Tensor, _packed: Tensor, shape: list[int], *_rest: Any, bias: Any = None, **_more: Any) -> Tensor:
    """What bitsandbytes does for a training batch: the weight is unpacked for the time of a plain product."""
    product = torch.mm(x.reshape(-1, shape[1]), x.new_empty(shape).t())  # `linear` would be one operation here
    product = product if bias is None else product.add_(bias)
    return product.view(*x.shape[:-1], shape[0])
