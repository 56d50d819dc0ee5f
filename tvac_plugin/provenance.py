"""The proof that a defense ran: a manifest beside the weights it belongs to, and a trace of what was drawn.

The manifest is written only after defended steps, and names the hash of the weights; weights that changed since, or
that a later undefended run put in their place, no longer match it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tvac_plugin.configs.base import DefenseConfig
from tvac_plugin.defenses import defense_name
from tvac_plugin.defenses.base import Position, StepReport
from tvac_plugin.files import sha256, write_json

MANIFEST_FILE = "safety_defense.json"
TRACE_FILE = "safety_trace.jsonl"
FORMAT = 1
_NOT_WEIGHTS = ("training_args", "safety_defense_state")
_PACKAGES = ("tvac-plugin", "torch", "transformers", "trl", "peft", "accelerate", "axolotl")


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
        self._facts = {
            "format": FORMAT,
            "defense": defense_name(config),
            "settings": config.model_dump(mode="json"),
            "seed": seed,
            "data": dict(data),
            "versions": versions(),
        }
        self._reset()
        self._writes = False
        self._trace: Path | None = None
        self._layers: tuple[int, ...] = ()

    @property
    def num_steps(self) -> int:
        """Defended optimizer steps so far."""
        return self._num_steps

    def begin(self, output_dir: Path, *, resumed: bool, write: bool) -> None:
        """Opens the trace in `output_dir` and removes the manifest of an earlier run there.

        Args:
            output_dir: Where the run leaves its files; made when missing.
            resumed: Whether an earlier trace is continued.
            write: Whether this process writes files at all.
        """
        self._reset()
        self._writes = write
        if not write:
            return
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / MANIFEST_FILE).unlink(missing_ok=True)
        self._trace = output_dir / TRACE_FILE
        if not resumed or not self._trace.exists():
            self._trace.write_text("", encoding="utf-8")

    def _reset(self) -> None:
        self._num_steps = 0
        self._num_fired = 0
        self._num_idle = torch.zeros((), dtype=torch.long)

    def add(self, report: StepReport, position: Position) -> None:
        """Takes in one micro-batch."""
        self._num_steps += position.starts_step
        self._num_fired += report.num_fired
        if report.norms:
            did_nothing = torch.stack([norm == 0 for norm in report.norms.values()]).all()
            self._num_idle = self._num_idle.to(did_nothing.device) + did_nothing
        self._layers = report.active_layers
        for event in report.events:
            self._write_trace({"step": position.step, **event})

    def trace_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the sampled line of one logged step."""
        self._write_trace({"step": step, "event": "step", "layers": list(self._layers), **metrics})

    def seal(self, model_dir: Path) -> None:
        """Writes the manifest of the weights in `model_dir`; does nothing before the first defended step."""
        if not self._writes or self._num_steps == 0:
            return
        manifest = self._facts | {
            "defended_steps": self._num_steps,
            "hook_fires": self._num_fired,
            "idle_batches": int(self._num_idle),
            "weights": weight_hashes(model_dir),
        }
        write_json(model_dir / MANIFEST_FILE, manifest)

    def state_dict(self) -> dict[str, Any]:
        """The counts so far and the settings they belong to, as JSON values."""
        return {
            "settings": [self._facts["defense"], self._facts["settings"]],
            "num_steps": self._num_steps,
            "num_fired": self._num_fired,
            "num_idle": int(self._num_idle),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, step: int) -> None:
        """Restores `state_dict` and cuts the trace back to what was written before `step`.

        Raises:
            ValueError: The checkpoint was written with another defense or other settings.
        """
        name, settings = state["settings"]
        if [name, settings] != [self._facts["defense"], self._facts["settings"]]:
            raise ValueError(
                f"the checkpoint was trained with {name} {settings}, this recipe asks for "
                f"{self._facts['defense']} {self._facts['settings']}. Restore the settings or start anew."
            )
        self._num_steps = state["num_steps"]
        self._num_fired = state["num_fired"]
        self._num_idle = torch.tensor(state["num_idle"])
        if self._trace is not None:
            lines = self._trace.read_text(encoding="utf-8").splitlines(keepends=True)
            self._trace.write_text("".join(line for line in lines if _is_before(line, step)), encoding="utf-8")

    def _write_trace(self, line: Mapping[str, Any]) -> None:
        if self._trace is not None:
            with self._trace.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


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
        raise ProvenanceError(
            f"{path}: not found, so nothing shows that this model was defended. Train it with `safety_defense:` on; "
            "`axolotl tvac check RECIPE` tells whether it will be."
        )
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


def weight_hashes(model_dir: Path) -> dict[str, str]:
    """SHA-256 of every weight file directly in `model_dir`, by file name."""
    files = sorted(path for path in model_dir.iterdir() if path.suffix in (".safetensors", ".bin"))
    return {path.name: sha256(path) for path in files if not path.name.startswith(_NOT_WEIGHTS)}


def versions() -> dict[str, str]:
    """Installed versions of what decides the result, by package."""

    def installed(packages: Iterable[str]) -> Iterable[tuple[str, str]]:
        for package in packages:
            try:
                yield package, version(package)
            except PackageNotFoundError:
                continue

    return dict(installed(_PACKAGES))


def _is_before(line: str, step: int) -> bool:
    try:
        entry = json.loads(line)
    except ValueError:
        return False
    is_log: bool = entry.get("event") == "step"
    return bool(entry["step"] <= step if is_log else entry["step"] < step)
