"""The layers below the lowest perturbed one: both passes of a step read the same states there, so they run once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class SharedPrefix:
    """The first layers of a decoder, none of which learns in this step.

    The first pass runs them without autograd and keeps the last one's output; the second takes it from there. Random
    numbers that dropout took below are counted as taken, so the layers above see the same masks in both passes.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        """Shares nothing when `layers` is empty."""
        self._layers = layers
        self._output: Any = None
        self._random_state: list[Tensor] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Around the first pass."""

        def without_autograd(forward: Callable[..., Any], *, is_last: bool) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                with torch.no_grad():
                    output = forward(*args, **kwargs)
                if is_last:
                    self._output, self._random_state = output, _random_state(_device(output))
                return output

            return run

        last = self._layers[-1] if self._layers else None
        forwards = {layer: without_autograd(layer.forward, is_last=layer is last) for layer in self._layers}
        with _replaced_forward(forwards):
            yield

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Around the second pass."""

        def skip(*_args: Any, **_kwargs: Any) -> Any:
            _set_random_state(_device(self._output), self._random_state)
            return self._output

        with _replaced_forward(dict.fromkeys(self._layers, skip)):
            yield


@contextmanager
def _replaced_forward(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Calls the given functions instead of the modules' `forward`; whatever was there before comes back."""
    before = {module: module.__dict__["forward"] for module in forwards if "forward" in module.__dict__}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module in forwards:
            del module.__dict__["forward"]
        for module, forward in before.items():
            module.__dict__["forward"] = forward


def _device(output: Any) -> torch.device:
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, Tensor), f"a decoder layer returned {type(output).__name__}"
    return hidden.device


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
