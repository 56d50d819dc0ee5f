"""A defense's state in a checkpoint: JSON values, and tensors in safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tvac_plugin.files import write_json

STATE_FILE = "safety_defense_state.json"
TENSORS_FILE = "safety_defense_state.safetensors"


class State(NamedTuple):
    """What is needed to go on as if nothing had happened.

    Attributes:
        defense: What the defense's `state_dict` returned.
        record: What the run record's `state_dict` returned.
    """

    defense: dict[str, Any]
    record: dict[str, Any]


def save_state(checkpoint: Path, *, defense: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Writes the state into the folder of a checkpoint."""
    tensors = {name: value.contiguous().cpu() for name, value in defense.items() if isinstance(value, Tensor)}
    values = {name: value for name, value in defense.items() if name not in tensors}
    if tensors:
        save_file(tensors, checkpoint / TENSORS_FILE)
    write_json(checkpoint / STATE_FILE, {"defense": values, "record": dict(record), "tensors": sorted(tensors)})


def load_state(checkpoint: Path) -> State:
    """Reads what `save_state` wrote.

    Raises:
        ValueError: A file is missing or damaged.
    """
    path = checkpoint / STATE_FILE
    if not path.is_file():
        raise ValueError(
            f"{path}: not found, so the defense cannot go on where it stopped. Resume from a checkpoint that "
            "was written with the defense on and without save_only_model."
        )
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        tensors = load_file(checkpoint / TENSORS_FILE) if state["tensors"] else {}
        return State({**state["defense"], **{name: tensors[name] for name in state["tensors"]}}, state["record"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(
            f"{checkpoint}: the defense's state in it is damaged ({type(error).__name__}). Resume from an earlier "
            "checkpoint."
        ) from error
