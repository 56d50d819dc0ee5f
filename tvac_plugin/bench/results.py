"""The results of a benchmark as one document, and where it was taken."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from tvac_plugin.bench.settings import Settings
from tvac_plugin.bench.shape import Shape
from tvac_plugin.boundary.errors import UserError

RESULTS_FILE = "bench.json"


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Draw(_Document):
    """What one step does; of a defense that draws layers, with one set of them.

    Attributes:
        layers: The layers drawn.
        layer_forwards: Decoder layers run.
        layer_backwards: Decoder layers differentiated.
        flops: Floating point operations of the matrix products.
        saved_bytes: Peak of what autograd graphs held.
        peak_bytes: Peak memory during the step; `None` where it cannot be read.
        rise_bytes: How far that is above the memory before it.
    """

    layers: list[int]
    layer_forwards: int
    layer_backwards: int
    flops: int
    saved_bytes: int
    peak_bytes: int | None
    rise_bytes: int | None


class CaseResult(_Document):
    """One case.

    Attributes:
        settings: The defense's, `None` without one.
        draws: Exact counts.
        seconds: Every timed step: a list for each round, in it one number for each draw, or for each turn of a case
            without draws. A baseline leaves them out.
        time_ratio: Time over SFT's: of each draw the median over rounds of time over the round's median of SFT, then
            the mean over draws. `None` if nothing was timed.
        time_low: Lower quartile over the rounds of the mean over draws.
        time_high: Upper quartile.
        same_as_sft: Whether loss and gradients are SFT's bit for bit; `None` for defenses.
    """

    settings: dict[str, Any] | None
    draws: list[Draw]
    seconds: list[list[float]]
    time_ratio: float | None
    time_low: float | None
    time_high: float | None
    same_as_sft: bool | None

    def mean(self, count: str) -> float:
        """Mean over draws of the count of that name; not a number where it is unknown."""
        values = [getattr(draw, count) for draw in self.draws]
        return float("nan") if None in values else fmean(values)


class Run(_Document):
    """All cases on one shape; `varied` names what differs from the first run's shape."""

    shape: Shape
    varied: str | None
    cases: dict[str, CaseResult]


class Results(_Document):
    """What `bench.json` holds. The first run is the benchmark; the others show how cost grows."""

    format: Literal[1] = 1
    machine: dict[str, Any]
    versions: dict[str, str]
    settings: Settings
    runs: list[Run]

    @property
    def main(self) -> Run:
        """The run that is not varied."""
        return self.runs[0]


def read_results(path: Path) -> Results:
    """Reads what a benchmark wrote.

    Raises:
        UserError: The file is missing, damaged or something else.
    """
    try:
        return Results.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read. Name a file that `axolotl tvac bench` wrote.") from error
    except ValidationError as error:
        raise UserError(
            f"{path}: not the results of a benchmark, or of another version. Write it again with --write-baseline."
        ) from error


def machine(device: str) -> dict[str, Any]:
    """Processor, memory and load, as far as the system tells."""
    facts: dict[str, Any] = {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    if hasattr(os, "getloadavg"):
        facts["load_before"] = round(os.getloadavg()[0], 2)
    if device == "cuda":
        facts["accelerator"] = torch.cuda.get_device_name()
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
