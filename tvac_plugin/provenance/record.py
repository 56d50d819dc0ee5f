"""What a defense did in one training run, and the manifest that is written when it did something."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from logging import INFO, WARNING, getLogger
from pathlib import Path
from typing import Any

from torch import nn

from tvac_plugin.configs.base import DefenseConfig
from tvac_plugin.defenses.base import Position, StepReport
from tvac_plugin.provenance.effect import Effect
from tvac_plugin.provenance.manifest import (
    NOT_DEFENDED,
    PREVIOUS_MANIFEST_FILE,
    PREVIOUS_TRACE_FILE,
    set_aside,
    share_defended,
    write_manifest,
)
from tvac_plugin.provenance.model_files import base_hashes, file_hashes
from tvac_plugin.provenance.run_identity import refuse_other_run, run_facts, versions
from tvac_plugin.provenance.settling import Settling, settling
from tvac_plugin.provenance.signature import signing_key
from tvac_plugin.provenance.trace import Trace

LOG = getLogger(__name__)


class RunRecord:
    """Measures what a defense did in one training run, traces it, and seals the weights that came out."""

    def __init__(self, config: DefenseConfig, *, data: Mapping[str, Any], seed: int, base_model: str = "") -> None:
        """Starts a record.

        Args:
            config: The defense with its resolved settings.
            data: Facts about the data, from `tvac_plugin.data.fingerprints.data_facts`.
            seed: The run's seed.
            base_model: Folder or hub id of the model that is trained; "" if it has none.

        Raises:
            UserError: `TVAC_SIGNING_KEY` names no key.
        """
        signing_key()  # or what is wrong with it would be known only after training
        self._config = config
        base = {"name": base_model, "files": base_hashes(base_model) if base_model else {}}
        self._facts = run_facts(config, seed=seed) | {"base_model": base, "data": dict(data)}
        self._trace: Trace | None = None
        self._output_dir: Path | None = None
        self._layers: tuple[int, ...] = ()
        self._reset()

    @property
    def num_steps(self) -> int:
        """Optimizer steps so far."""
        return self._effect.num_steps

    def begin(self, output_dir: Path, *, resumed: bool, write: bool, weights: Sequence[nn.Parameter] = ()) -> None:
        """Opens the trace in `output_dir` and sets the proof of an earlier run there aside.

        Args:
            output_dir: Where the run leaves its files; made when missing.
            resumed: Whether `load_state_dict` follows and the trace is continued.
            write: Whether this process writes files at all.
            weights: The trainable ones, as they are before training.
        """
        self._reset()
        if not write:
            return
        self._effect.start(weights)
        output_dir.mkdir(parents=True, exist_ok=True)
        set_aside(output_dir)
        self._output_dir = output_dir
        self._trace = Trace(output_dir)
        if not resumed:
            self._trace.start()

    def _reset(self) -> None:
        self._effect = Effect()
        self._settling = Settling({}, [])
        self._earlier_versions: list[dict[str, str]] = []

    def add(self, report: StepReport, position: Position) -> None:
        """Takes in one micro-batch."""
        self._effect.add(report, position)
        self._layers = report.active_layers
        for event in report.events:
            self._write_trace({"step": position.step, **event})

    def trace_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the sampled line of one logged step."""
        self._write_trace({"step": step, "event": "step", "layers": list(self._layers), **metrics})

    def look(self, weights: Sequence[nn.Parameter], *, is_last: bool = False) -> None:
        """Measures the trainable weights that the next manifest is for; after the last look they must not change."""
        if self._output_dir is not None:
            self._effect.look(weights, is_last=is_last)

    def look_at_log(self, log: Sequence[Mapping[str, Any]], *, is_last: bool = False) -> None:
        """Notes whether the losses have settled, for the next manifest; warns if they have not where training ends.

        Args:
            log: The trainer's `log_history` so far.
            is_last: Whether training ends here.
        """
        if self._output_dir is None:
            return
        self._settling = settling(log)
        if is_last and self._settling.problems:
            problems = "; ".join(self._settling.problems)
            LOG.warning(
                f"{self._output_dir}: training ended before its losses had settled: {problems}. "
                "Train for more steps; if the perturbed loss stays far above the clean one, lower `rho`."
            )

    def seal(self, model_dir: Path) -> str | None:
        """Writes the manifest of the model in `model_dir`, if the defense is measured to have had an effect on it.

        Returns:
            In how many batches it did something; `None` if no manifest was written.
        """
        if self._output_dir is None or self.num_steps == 0:
            return None
        problems = self._config.effect_problems() + self._effect.problems()
        if problems:
            LOG.warning(
                f"{model_dir}: no manifest is written, for this model is not defended: {'; '.join(problems)}. "
                "Look at the losses in the trace, at the learning rate, and at the strength in the settings."
            )
            if model_dir == self._output_dir:
                self._write_trace({"step": self.num_steps, "event": NOT_DEFENDED, "reasons": problems})
            return None
        manifest = self._facts | {"versions": versions()} | self._effect.facts()
        manifest |= self._settling.facts() | {"files": file_hashes(model_dir)}
        if self._earlier_versions:
            manifest["earlier_versions"] = self._earlier_versions
        write_manifest(model_dir, manifest)
        done = f"{model_dir}: {self._config.block}, {share_defended(manifest)}"
        LOG.log(WARNING if manifest["idle_batches"] else INFO, done)
        if model_dir == self._output_dir:
            for name in (PREVIOUS_MANIFEST_FILE, PREVIOUS_TRACE_FILE):
                (model_dir / name).unlink(missing_ok=True)
        return done

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far and the run it belongs to, as JSON values."""
        return {
            "run": self._facts,
            "versions": [*self._earlier_versions, versions()],
            "effect": self._effect.state_dict(),
            "layers": list(self._layers),
            "trace": None if self._trace is None else self._trace.position(),
        }

    def refuse_other_run(self, state: Mapping[str, Any], *, checkpoint: Path) -> None:
        """Refuses to go on where another run stopped.

        Raises:
            UserError: `state` belongs to a run with other settings, seed, base model or data.
        """
        refuse_other_run(state["run"], self._facts, checkpoint=checkpoint)

    def load_state_dict(self, state: Mapping[str, Any], *, trace_from: Path) -> None:
        """Restores `state_dict`, and the trace that had been written by then.

        Args:
            state: What `state_dict` returned.
            trace_from: The output folder of the run that wrote it.
        """
        self._effect.load_state_dict(state["effect"])
        self._layers = tuple(state["layers"])
        *earlier, last = state["versions"]
        self._earlier_versions = [*earlier, last] if last != versions() else earlier
        if self._trace is not None and state["trace"] is not None:
            self._trace.resume(state["trace"], earlier=trace_from)

    def _write_trace(self, line: Mapping[str, Any]) -> None:
        if self._trace is not None:
            self._trace.append(line)
