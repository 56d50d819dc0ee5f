"""Takes a benchmark: counts every case exactly, measures its memory, then times all of them in turns."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from tvac_plugin.bench.cases import OFF, PLAIN, Case, built_cases
from tvac_plugin.bench.counts import count_step
from tvac_plugin.bench.memory import step_memory
from tvac_plugin.bench.results import CaseResult, Draw, Results, Run, machine
from tvac_plugin.bench.settings import Settings
from tvac_plugin.bench.shape import Shape
from tvac_plugin.bench.timing import ratio, timed
from tvac_plugin.boundary.errors import UserError
from tvac_plugin.provenance.run_identity import versions

Say = Callable[[str], None]
SCALED = {
    "num_layers": (0.5, 2),
    "hidden_size": (0.5, 2),
    "sequence_len": (0.5, 2),
    "num_active_layers": (0.25, 0.5, 2, 4),
}
"""What `scale` varies, one at a time, and by which factors."""


def benchmark(shape: Shape, settings: Settings, *, scale: bool = False, say: Say = lambda _text: None) -> Results:
    """Measures all cases on `shape`, and with `scale` on shapes around it.

    Raises:
        UserError: The device is not there.
        UserError: A defense cannot work with this shape or these settings.
    """
    if shape.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA GPU can be used here. Leave it out to measure on the CPU.")
    where = machine(shape.device)
    shapes = [(None, shape), *(scaled_shapes(shape) if scale else [])]
    with _threads(settings.threads), _collector_at_rest():
        runs = [_run(each, varied, settings, say) for varied, each in shapes]
    return Results(machine=where, versions=versions(), settings=settings, runs=runs)


def scaled_shapes(shape: Shape) -> list[tuple[str | None, Shape]]:
    """Shapes that differ from `shape` in one size each, smallest first; those that cannot be built are left out."""
    found: list[tuple[str | None, Shape]] = []
    for size, factors in SCALED.items():
        for factor in factors:
            value = int(getattr(shape, size) * factor)
            try:
                found.append((size, Shape.model_validate(shape.model_dump() | {size: value})))
            except ValueError:
                continue
    return found


def _run(shape: Shape, varied: str | None, settings: Settings, say: Say) -> Run:
    if varied is not None:
        say(f"{varied} {getattr(shape, varied)}")
    with built_cases(shape, settings) as cases:
        draws, digests = {}, {}
        for name, case in cases.items():
            say(f"counting {name}")
            draws[name] = [_draw(case, draw, shape.device) for draw in range(case.num_draws)]
            if name in (PLAIN, OFF):
                digests[name] = case.digest(case.step(0))
                case.clear()
        seconds = timed(cases, settings, say)
        results = {}
        for name, case in cases.items():
            times = ratio(seconds[name], seconds[PLAIN])
            results[name] = CaseResult(
                settings=None if case.config is None else case.config.model_dump(mode="json"),
                draws=draws[name],
                seconds=seconds[name],
                time_ratio=None if times is None else times.middle,
                time_low=None if times is None else times.low,
                time_high=None if times is None else times.high,
                same_as_sft=digests[name] == digests[PLAIN] if name in digests else None,
            )
    return Run(shape=shape, varied=varied, cases=results)


def _draw(case: Case, draw: int, device: str) -> Draw:
    counts = count_step(case.model, lambda: case.step(draw))
    case.clear()
    memory = step_memory(device, lambda: case.step(draw))
    case.clear()
    return Draw(
        layers=case.active_layers(),
        **counts._asdict(),
        peak_bytes=None if memory is None else memory.peak,
        rise_bytes=None if memory is None else memory.rise,
    )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    """Garbage is collected between steps; what the libraries brought along need not be looked through every time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
