"""What the probes of an earlier run found, read from its trace."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.configs.base import DefenseConfig
from tvac_plugin.data.jsonl import json_rows
from tvac_plugin.provenance.trace import TRACE_FILE

_WHAT = (
    f"Name the {TRACE_FILE} of a run with t_vaccine or oasis, or a file with one JSON list of a probability for each "
    "layer."
)


def read_probes(path: Path, *, num_layers: int) -> list[list[float]]:
    """Probabilities of all layers, for each probe in a trace, or the one list in a file.

    Args:
        path: A trace, or a JSON list of numbers.
        num_layers: Of the model that is planned or measured.

    Raises:
        UserError: There are none in the file, or they are for another number of layers.
    """
    probes = _probes(path)
    for probe in probes:
        if not all(map(_is_probability, probe)) or not math.fsum(probe) > 0:
            raise UserError(f"--draws-from {path}: not all of its probabilities are numbers from 0 to 1. {_WHAT}")
        if len(probe) != num_layers:
            raise UserError(
                f"--draws-from {path}: has probabilities of {len(probe)} layers, and the model has {num_layers}. "
                "Name the trace of a run on a model with as many layers."
            )
    return probes


def draws_problem(config: DefenseConfig | None, *, name: str) -> str | None:
    """Why what probes found says nothing about the defense `name` with these settings, if it does not."""
    if config is None or not config.draws_layers:
        return f"--draws-from: {name} draws no layers. Leave it out."
    if getattr(config, "layer_sampling", None) == "uniform":
        return (
            f"--draws-from: with `{config.block}.layer_sampling: uniform` no probe decides what is drawn. Leave it out."
        )
    return None


def _probes(path: Path) -> list[list[float]]:
    try:
        values = [row.value for row in json_rows(path)]
    except (OSError, UserError) as error:
        raise UserError(f"--draws-from {path}: cannot be read ({error}). {_WHAT}") from error
    if values and not any(isinstance(value, dict) for value in values):
        return [values]
    found = [value for value in values if isinstance(value, dict) and value.get("event") == "probe"]
    probes = [probe for value in found if isinstance(probe := value.get("probabilities"), list)]
    if not probes or len(probes) < len(found):
        raise UserError(f"--draws-from {path}: holds no probe. {_WHAT}")
    return probes


def _is_probability(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
