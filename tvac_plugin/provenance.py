"""The proof that a defense ran: a manifest beside the weights it belongs to.

The manifest is written only after defended steps, and names the hash of the weights; weights that changed since, or
that a later undefended run put in their place, no longer match it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from logging import getLogger
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch

from tvac_plugin.configs.base import DefenseConfig
from tvac_plugin.defenses.base import Position, StepReport
from tvac_plugin.files import sha256, write_json
from tvac_plugin.identity import FORMAT, refuse_other_run, run_facts, versions
from tvac_plugin.trace import TRACE_FILE, Trace

MANIFEST_FILE = "safety_defense.json"
PREVIOUS_MANIFEST_FILE = "safety_defense.previous.json"
PREVIOUS_TRACE_FILE = "safety_trace.previous.jsonl"
LOG = getLogger(__name__)
__all__ = [
    "FORMAT", "MANIFEST_FILE", "TRACE_FILE", "ProvenanceError", "RunRecord", "set_aside", "verify", "versions",
    "weight_hashes",
]  # fmt: skip
_NOT_WEIGHTS = ("training_args", "safety_defense_state")


class ProvenanceError(ValueError):
    """A model cannot be shown to have been trained with a defense."""


class RunRecord:
    """Counts what a defense did in one training run, traces it, and seals the weights that came out."""

    def __init__(self, config: DefenseConfig, *, data: Mapping[str, Any], seed: int) -> None:
        """Starts a record.

        Args:
            config: The defense with its resolved settings.
            data: Facts about the data, from `tvac_plugin.overlap.data_facts`.
            seed: The run's seed.
        """
        self._facts = run_facts(config, seed=seed) | {"data": dict(data)}
        self._trace: Trace | None = None
        self._output_dir: Path | None = None
        self._layers: tuple[int, ...] = ()
        self._reset()

    @property
    def num_steps(self) -> int:
        """Defended optimizer steps so far."""
        return self._num_steps

    def begin(self, output_dir: Path, *, resumed: bool, write: bool) -> None:
        """Opens the trace in `output_dir` and sets the proof of an earlier run there aside.

        Args:
            output_dir: Where the run leaves its files; made when missing.
            resumed: Whether `load_state_dict` follows and the trace is continued.
            write: Whether this process writes files at all.
        """
        self._reset()
        if not write:
            return
        output_dir.mkdir(parents=True, exist_ok=True)
        set_aside(output_dir)
        self._output_dir = output_dir
        self._trace = Trace(output_dir)
        if not resumed:
            self._trace.start()

    def _reset(self) -> None:
        self._num_steps = 0
        self._num_fired = 0
        self._num_judged = 0
        self._num_idle = torch.zeros((), dtype=torch.long)
        self._earlier_versions: list[dict[str, str]] = []

    def add(self, report: StepReport, position: Position) -> None:
        """Takes in one micro-batch."""
        self._num_steps += position.starts_step
        self._num_fired += report.num_fired
        if report.idle is not None:
            self._num_judged += 1
            self._num_idle = self._num_idle.to(report.idle.device) + report.idle
        self._layers = report.active_layers
        for event in report.events:
            self._write_trace({"step": position.step, **event})

    def trace_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the sampled line of one logged step."""
        self._write_trace({"step": step, "event": "step", "layers": list(self._layers), **metrics})

    def seal(self, model_dir: Path) -> None:
        """Writes the manifest of the weights in `model_dir`, unless the defense has not done anything yet."""
        if self._output_dir is None or self._num_steps == 0:
            return
        num_idle = int(self._num_idle)
        if 0 < self._num_judged == num_idle:
            LOG.warning(
                f"{model_dir}: no manifest is written, because the defense did nothing in any of {num_idle} batches: "
                "what it would have added was always zero or not finite. Look at the loss in the trace and at rho or "
                "the scales in the settings."
            )
            return
        manifest = self._facts | {
            "versions": versions(),
            "defended_steps": self._num_steps,
            "hook_fires": self._num_fired,
            "idle_batches": num_idle,
            "weights": weight_hashes(model_dir),
        }
        if self._earlier_versions:
            manifest["earlier_versions"] = self._earlier_versions
        write_json(model_dir / MANIFEST_FILE, manifest)
        if model_dir == self._output_dir:
            for name in (PREVIOUS_MANIFEST_FILE, PREVIOUS_TRACE_FILE):
                (model_dir / name).unlink(missing_ok=True)

    def state_dict(self) -> dict[str, Any]:
        """The counts so far and the run they belong to, as JSON values."""
        return {
            "run": self._facts,
            "versions": [*self._earlier_versions, versions()],
            "num_steps": self._num_steps,
            "num_fired": self._num_fired,
            "num_judged": self._num_judged,
            "num_idle": int(self._num_idle),
            "layers": list(self._layers),
            "trace": None if self._trace is None else self._trace.position(),
        }

    def refuse_other_run(self, state: Mapping[str, Any], *, checkpoint: Path) -> None:
        """Raises `ValueError` if `state` belongs to a run with other settings, seed or data."""
        refuse_other_run(state["run"], self._facts, checkpoint=checkpoint)

    def load_state_dict(self, state: Mapping[str, Any], *, trace_from: Path) -> None:
        """Restores `state_dict`, and the trace that had been written by then.

        Args:
            state: What `state_dict` returned.
            trace_from: The output folder of the run that wrote it.
        """
        self._num_steps = state["num_steps"]
        self._num_fired = state["num_fired"]
        self._num_judged = state["num_judged"]
        self._num_idle = torch.tensor(state["num_idle"])
        self._layers = tuple(state["layers"])
        *earlier, last = state["versions"]
        self._earlier_versions = [*earlier, last] if last != versions() else earlier
        if self._trace is not None and state["trace"] is not None:
            self._trace.resume(state["trace"], earlier=trace_from)

    def _write_trace(self, line: Mapping[str, Any]) -> None:
        if self._trace is not None:
            self._trace.append(line)


def set_aside(output_dir: Path) -> None:
    """Renames the manifest and copies the trace of a finished run, when another run starts in its folder.

    From then on the folder holds files of both, so nothing may claim to be defended before the new run is done.
    """
    manifest = output_dir / MANIFEST_FILE
    if not manifest.is_file():
        return
    if (output_dir / TRACE_FILE).is_file():
        copyfile(output_dir / TRACE_FILE, output_dir / PREVIOUS_TRACE_FILE)
    manifest.replace(output_dir / PREVIOUS_MANIFEST_FILE)


def verify(model_dir: Path, *, defense: str | None = None) -> dict[str, Any]:
    """Returns the manifest of `model_dir` after holding it against the weights there.

    Args:
        model_dir: A folder with an adapter or a full model.
        defense: The defense that is claimed; `None` accepts any.

    Raises:
        ProvenanceError: There is no manifest, it is for another defense, or the weights are not the ones it names.
    """
    path = model_dir / MANIFEST_FILE
    if not model_dir.is_dir():
        raise ProvenanceError(f"{model_dir}: no such folder. Name the `output_dir` of a training run.")
    if not path.is_file():
        raise ProvenanceError(f"{path}: not found, so nothing shows that this model was defended. {_way_out(path)}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        name, weights = manifest["defense"], manifest["weights"]
    except (ValueError, TypeError, KeyError) as error:
        raise ProvenanceError(
            f"{path}: not a manifest: it is damaged or was written by something else. Train the model again."
        ) from error
    if defense is not None and name != defense:
        raise ProvenanceError(f"{path}: the model was trained with {name}, not {defense}. Correct the recipe.")
    if not weights or weights != weight_hashes(model_dir):
        raise ProvenanceError(
            f"{path}: the weights in this folder are not the ones that were defended. Train the model again."
        )
    return dict(manifest)


def _way_out(manifest: Path) -> str:
    if manifest.with_name(PREVIOUS_MANIFEST_FILE).is_file():
        return (
            f"A later run started here and did not finish; the manifest of the one before is {PREVIOUS_MANIFEST_FILE}. "
            "Resume the later run, or give the earlier manifest its name back if no other file here was changed."
        )
    if manifest.with_name(TRACE_FILE).is_file():
        return (
            "A defended run started here and did not finish, or its defense did nothing: look at the end of "
            f"{TRACE_FILE}. Resume it with auto_resume_from_checkpoints, or train again."
        )
    return "Train it with `safety_defense:` on; `axolotl tvac check RECIPE` tells whether it will be."


def weight_hashes(model_dir: Path) -> dict[str, str]:
    """SHA-256 of every weight file directly in `model_dir`, by file name."""
    files = sorted(path for path in model_dir.iterdir() if path.suffix in (".safetensors", ".bin"))
    return {path.name: sha256(path) for path in files if not path.name.startswith(_NOT_WEIGHTS)}
