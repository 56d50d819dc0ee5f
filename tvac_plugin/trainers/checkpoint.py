"""A defense's state in a checkpoint: JSON values, and tensors in safetensors.

A checkpoint is written file by file, `trainer_state.json` last, so one without it is what a killed run left.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from logging import getLogger
from pathlib import Path
from shutil import rmtree
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.boundary.files import checkpoints, naming, write_json
from tvac_plugin.provenance.manifest import MANIFEST_FILE
from tvac_plugin.provenance.model_files import weight_hashes

STATE_FILE = "safety_defense_state.json"
TENSORS_FILE = "safety_defense_state.safetensors"
_WINDOW_FILE = "safety_defense_state.{rank}.json"
FORMAT = 5
LOG = getLogger(__name__)


class CheckpointState(NamedTuple):
    """What is needed to go on as if nothing had happened.

    Attributes:
        defense: What the defense's `state_dict` returned.
        record: What the run record's `state_dict` returned.
    """

    defense: dict[str, Any]
    record: dict[str, Any]


def save_state(checkpoint: Path, *, defense: Mapping[str, Any], record: Mapping[str, Any], num_processes: int) -> None:
    """Writes the state into the folder of a checkpoint whose weights are there already.

    Raises:
        UserError: The defense's state holds something that is neither a tensor nor a JSON value.
    """
    tensors = {name: value.contiguous().cpu() for name, value in defense.items() if isinstance(value, Tensor)}
    values = {name: value for name, value in defense.items() if name not in tensors}
    for name, value in values.items():
        _refuse_unreadable(name, value)
    if tensors:
        with naming(checkpoint / TENSORS_FILE):
            save_file(tensors, checkpoint / TENSORS_FILE)
    state = {
        "defense": values, "record": dict(record), "num_processes": num_processes, "tensors": sorted(tensors),
    }  # fmt: skip
    write_json(checkpoint / STATE_FILE, {"format": FORMAT, **state, "weights": weight_hashes(checkpoint)})


def load_state(checkpoint: Path, *, num_processes: int) -> CheckpointState:
    """Reads what `save_state` wrote.

    Raises:
        UserError: The checkpoint is not complete, was written without a defense or by another number of processes
            than `num_processes`, or is damaged.
    """
    _refuse_incomplete(checkpoint)
    path = checkpoint / STATE_FILE
    if not path.is_file():
        raise UserError(
            f"{path}: not found, so the defense cannot go on where it stopped. Resume from a checkpoint that "
            "was written with the defense on and without save_only_model, or start anew in another `output_dir:`."
        )
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise UserError(
                f"{path}: written by another version of tvac-plugin. Resume with that version, or start anew."
            )
        tensors = load_file(checkpoint / TENSORS_FILE) if state["tensors"] else {}
        defense = {**state["defense"], **{name: tensors[name] for name in state["tensors"]}}
        weights, written_by = state["weights"], int(state["num_processes"])
        state["record"]["run"]["defense"]
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"{checkpoint}: the defense's state in it is damaged ({type(error).__name__}). Resume from an earlier "
            "checkpoint."
        ) from error
    if weights != weight_hashes(checkpoint):
        raise UserError(
            f"{checkpoint}: the weights in it are not the ones that were saved with the defense's state. Resume from "
            "an earlier checkpoint."
        )
    if written_by != num_processes:
        raise UserError(
            f"{checkpoint}: {_processes(written_by)} trained it and {_processes(num_processes)} would go on, which "
            f"reads the rows in another order and draws other random numbers. Launch {_processes(written_by)}, or "
            "start anew in another `output_dir:`."
        )
    return CheckpointState(defense, state["record"])


def save_window(checkpoint: Path, *, rank: int, window: Mapping[str, Any]) -> None:
    """Writes what one process has gathered since the last log."""
    write_json(checkpoint / _WINDOW_FILE.format(rank=rank), dict(window))


def load_window(checkpoint: Path, *, rank: int) -> dict[str, Any]:
    """Reads what `save_window` wrote.

    Raises:
        UserError: The file is damaged or not there.
    """
    path = checkpoint / _WINDOW_FILE.format(rank=rank)
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}). Resume from an earlier checkpoint.") from error


def newest_complete(output_dir: Path) -> Path | None:
    """The checkpoint of the highest step that was written to its end; warns of those it leaves out."""
    for checkpoint in reversed(checkpoints(output_dir).values()):
        if is_complete(checkpoint):
            return checkpoint
        LOG.warning(f"{checkpoint}: left out, the run that wrote it ended before it was complete")
    return None


def is_complete(checkpoint: Path) -> bool:
    """Whether the checkpoint was written to its end."""
    try:
        return isinstance(json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def begin_checkpoint(checkpoint: Path) -> None:
    """Takes from a folder that is about to be overwritten what would make a mixture of two runs look complete."""
    for name in (TRAINER_STATE_NAME, STATE_FILE, TENSORS_FILE, MANIFEST_FILE):
        (checkpoint / name).unlink(missing_ok=True)


def abandon_checkpoint(checkpoint: Path) -> None:
    """Removes a checkpoint that could not be completed, and with it what it takes from a full disk."""
    if not is_complete(checkpoint):
        rmtree(checkpoint, ignore_errors=True)


def _processes(number: int) -> str:
    return "1 process" if number == 1 else f"{number} processes"


def _refuse_incomplete(checkpoint: Path) -> None:
    if is_complete(checkpoint):
        return
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint}: no such checkpoint. Correct `resume_from_checkpoint:`.")
    others = [other for other in checkpoints(checkpoint.parent).values() if is_complete(other)]
    way_out = f"Resume from {others[-1]}" if others else "Delete it and start anew"
    raise UserError(
        f"{checkpoint}: not a complete checkpoint, {TRAINER_STATE_NAME} in it is missing or damaged: its run ended "
        f"while it was written. {way_out}."
    )


def _refuse_unreadable(name: str, value: Any) -> None:
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the defense's state_dict() has {name!r}, which cannot be saved: {error}. Return JSON values, and tensors "
            "only at the top level."
        ) from error
