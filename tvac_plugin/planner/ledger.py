"""Counts bytes and work of a training step, operation by operation.

`torch.distributed._tools.mem_tracker.MemTracker` does the same for one forward and one backward pass of a model without
frozen parameters. It refuses an adapter's frozen base and a second pass, which are what there is to count here; where
it works, a test holds this ledger against it. Work is counted by the formulas of `torch.utils.flop_counter`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

Kind = Literal["weights", "adapters", "optimizer", "gradients", "saved_activations", "logits_and_loss", "temporary"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_aten = torch.ops.aten
_FORMULAS = {
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
}


class Cost(NamedTuple):
    """What was counted.

    Attributes:
        at_peak: Bytes by kind at the moment when most were held.
        saved: The most bytes that autograd kept between forward and backward at one time, each storage once,
            parameters left out; logits included.
        flops: Floating point operations of the products and attentions; a multiplication and an addition are two.
    """

    at_peak: dict[Kind, int]
    saved: int
    flops: int

    @property
    def peak(self) -> int:
        """Bytes held at the worst moment."""
        return sum(self.at_peak.values())


class _Entry:
    """A storage that is alive."""

    def __init__(self, size: int, kind: Kind) -> None:
        self.size = size
        self.kind = kind
        self.num_saved = 0


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation inside its context, on fake tensors or real ones; each storage counts once.

    What a new storage is depends on `making` when it appears; it becomes a saved activation while autograd keeps it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.making: Kind = "temporary"
        self._entries: dict[int, tuple[weakref.ref[Any], _Entry]] = {}
        self._held = dict.fromkeys(KINDS, 0)
        self._at_peak = dict(self._held)
        self._total = self._peak = 0
        self._saved = self._saved_peak = 0
        self._flops = 0

    @property
    def cost(self) -> Cost:
        """What was counted so far."""
        return Cost(dict(self._at_peak), self._saved_peak, self._flops)

    def own(self, tensors: Iterable[Tensor], kind: Kind) -> None:
        """Counts tensors that were there before, or changes what they are."""
        for tensor in tensors:
            self._move(self._entry(tensor), kind)
        self._note_peak()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation, and counts what it made."""
        result = func(*args, **(kwargs or {}))
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self._flops += formula(*args, **(kwargs or {}), out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._entry(leaf)
        self._note_peak()
        return result

    @contextmanager
    def watching(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Inside it what autograd saves, and the gradients of `parameters`, are told apart from the rest."""
        handles = [
            parameter.register_post_accumulate_grad_hook(self._own_gradient)  # type: ignore[no-untyped-call]
            for parameter in parameters
        ]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _own_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.own([parameter.grad], "gradients")

    def _entry(self, tensor: Tensor) -> _Entry:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._entries:
            return self._entries[key][1]
        entry = _Entry(storage.nbytes(), self.making)
        self._entries[key] = (weakref.ref(storage, lambda _: self._drop(key)), entry)
        self._add(entry, 1)
        return entry

    def _drop(self, key: int) -> None:
        _, entry = self._entries.pop(key)
        self._add(entry, -1)

    def _move(self, entry: _Entry, kind: Kind) -> None:
        self._add(entry, -1)
        entry.kind = kind
        self._add(entry, 1)

    def _add(self, entry: _Entry, sign: int) -> None:
        self._held[entry.kind] += sign * entry.size
        self._total += sign * entry.size

    def _note_peak(self) -> None:
        if self._total > self._peak:
            self._peak = self._total
            self._at_peak = dict(self._held)

    def _pack(self, tensor: Tensor) -> _Saved:
        return _Saved(self, tensor)

    def keep(self, entry: _Entry) -> None:
        """Counts one more reason why autograd keeps a storage."""
        entry.num_saved += 1
        if entry.num_saved > 1 or entry.kind in ("weights", "adapters"):
            return
        self._saved += entry.size
        self._saved_peak = max(self._saved_peak, self._saved)
        if entry.kind == "temporary":
            self._move(entry, "saved_activations")

    def release(self, entry: _Entry) -> None:
        """Counts one less."""
        entry.num_saved -= 1
        if entry.num_saved or entry.kind in ("weights", "adapters"):
            return
        self._saved -= entry.size
        if entry.kind == "saved_activations":
            self._move(entry, "temporary")


class _Saved:
    """A tensor while a graph keeps it, without the graph: a node that keeps its own output would never be freed."""

    def __init__(self, ledger: Ledger, tensor: Tensor) -> None:
        self.tensor = tensor.detach()
        self._ledger, self._entry = ledger, ledger._entry(tensor)
        ledger.keep(self._entry)

    def __del__(self) -> None:
        self._ledger.release(self._entry)


def _unpack(saved: _Saved) -> Tensor:
    return saved.tensor
