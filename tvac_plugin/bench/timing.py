"""Steps of all cases timed in turns, so that a machine that gets slower for a while slows all of them down."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Mapping
from statistics import fmean, median, quantiles
from time import perf_counter
from typing import NamedTuple

import torch

from tvac_plugin.bench.cases import OFF, PLAIN, Case
from tvac_plugin.bench.settings import Settings

REFERENCES = (PLAIN, OFF)
TURNS_PER_REFERENCE = 4
Rounds = list[list[float]]


class Ratio(NamedTuple):
    """Time over SFT's, and its quartiles over rounds."""

    middle: float
    low: float
    high: float


def timed(cases: Mapping[str, Case], settings: Settings, say: Callable[[str], None]) -> dict[str, Rounds]:
    """Seconds of every step, by case, round and turn; after the warm-up rounds."""
    rng = random.Random(settings.seed)
    seconds: dict[str, Rounds] = {name: [] for name in cases}
    for number in range(settings.warmup + settings.repeats if settings.repeats else 0):
        say(f"round {number + 1} of {settings.warmup + settings.repeats}")
        taken: dict[str, dict[int, float]] = {name: {} for name in cases}
        for name, turn in turns(cases, rng):
            taken[name][turn] = _seconds(cases[name], turn)
        if number >= settings.warmup:
            for name, found in taken.items():
                seconds[name].append([found[turn] for turn in sorted(found)])
    return seconds


def turns(cases: Mapping[str, Case], rng: random.Random) -> Iterator[tuple[str, int]]:
    """One round: every draw of every defense once, shuffled; before every four of them SFT and the plugin off."""
    own = [(name, draw) for name, case in cases.items() if name not in REFERENCES for draw in range(case.num_draws)]
    rng.shuffle(own)
    for start in range(0, max(len(own), 1), TURNS_PER_REFERENCE):
        pair = [name for name in REFERENCES if name in cases]
        rng.shuffle(pair)
        yield from ((name, start // TURNS_PER_REFERENCE) for name in pair)
        yield from own[start : start + TURNS_PER_REFERENCE]


def ratio(seconds: Rounds, reference: Rounds) -> Ratio | None:
    """Of each turn the median over rounds of its time over the round's median of `reference`, then the mean of turns.

    `None` if nothing was timed.
    """
    if not seconds:
        return None
    scaled = [[time / median(base) for time in times] for times, base in zip(seconds, reference, strict=True)]
    means = [fmean(row) for row in scaled]
    low, _, high = quantiles(means, n=4, method="inclusive") if len(means) > 1 else (means[0],) * 3
    return Ratio(fmean(median(turn) for turn in zip(*scaled, strict=True)), low, high)


def _seconds(case: Case, turn: int) -> float:
    gc.collect()
    gc.disable()
    try:
        _wait(case)
        start = perf_counter()
        case.step(turn % case.num_draws)
        _wait(case)
        return perf_counter() - start
    finally:
        gc.enable()
        case.clear()


def _wait(case: Case) -> None:
    if case.trainer.args.device.type == "cuda":
        torch.cuda.synchronize()
