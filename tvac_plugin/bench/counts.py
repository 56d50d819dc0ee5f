"""What one training step does, counted exactly: layers run, layers differentiated, products, and bytes saved."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from tvac_plugin.model.architecture import find_blocks


class Counts(NamedTuple):
    """One step in numbers that are the same in every run.

    Attributes:
        layer_forwards: Forward passes through the attention of any decoder layer, with or without autograd.
        layer_backwards: Gradients that arrived at the output of any decoder layer.
        flops: Floating point operations of all matrix products, forward and backward.
        saved_bytes: Most bytes that autograd graphs alive at the same time held; parameters and buffers left out.
    """

    layer_forwards: int
    layer_backwards: int
    flops: int
    saved_bytes: int


def count_step(model: nn.Module, step: Callable[[], object]) -> Counts:
    """Runs `step` once and counts it."""
    saved = SavedActivations(model)
    with counted_passes(model) as passes, saved.recorded(), FlopCounterMode(display=False) as flops:
        step()
    return Counts(passes["forwards"], passes["backwards"], flops.get_total_flops(), saved.peak_bytes)


@contextmanager
def counted_passes(model: nn.Module) -> Iterator[Counter[str]]:
    """Counts layers run (`forwards`) and differentiated (`backwards`) inside the context.

    Attention is counted, not the whole layer, so that a layer whose result is reused does not count as run.
    """
    passes: Counter[str] = Counter()

    def ran(_module: nn.Module, _inputs: Any) -> None:
        passes["forwards"] += 1

    def watch(_module: nn.Module, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda _gradient: passes.update(backwards=1))

    handles = []
    try:
        for block in find_blocks(model):
            handles += [block.attention.register_forward_pre_hook(ran), block.layer.register_forward_hook(watch)]
        yield passes
    finally:
        for handle in handles:
            handle.remove()


class SavedActivations:
    """Bytes that autograd graphs hold for their backward passes.

    Every storage counts once, whole, from when the first graph saves it until the last one that did lets it go. What
    checkpointing keeps instead of activations is not seen by `saved_tensors_hooks` and not counted.
    """

    def __init__(self, model: nn.Module) -> None:
        """Leaves out the parameters and buffers of `model`."""
        self._left_out = {_address(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._num_holders: Counter[int] = Counter()
        self.bytes_now = 0
        self.peak_bytes = 0

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Counts what is saved inside the context."""
        with saved_tensors_hooks(self._pack, lambda saved: saved.tensor):
            yield

    def _pack(self, tensor: Tensor) -> _Kept:
        saved = _Kept(tensor)
        address, num_bytes = _address(tensor), tensor.untyped_storage().nbytes()
        if num_bytes and address not in self._left_out:
            if not self._num_holders[address]:
                self.bytes_now += num_bytes
                self.peak_bytes = max(self.peak_bytes, self.bytes_now)
            self._num_holders[address] += 1
            weakref.finalize(saved, self._release, address, num_bytes)
        return saved

    def _release(self, address: int, num_bytes: int) -> None:
        self._num_holders[address] -= 1
        if not self._num_holders[address]:
            self.bytes_now -= num_bytes


class _Kept:
    """A saved tensor whose end can be noticed."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
