"""A defense inside any `transformers.Trainer`: the mixin is the trainer's side of the seam in `defenses.base`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tvac_plugin.answers import reads_answers_only
from tvac_plugin.configs.base import DefenseConfig
from tvac_plugin.defenses import Defense, build_defense
from tvac_plugin.defenses.base import Batch, Position
from tvac_plugin.provenance import RunRecord
from tvac_plugin.streams import Row, Streams
from tvac_plugin.trainers.checkpoint import load_state, save_state
from tvac_plugin.trainers.host import TrainerHost
from tvac_plugin.trainers.metrics import StepMetrics


class SafetyDefenseMixin(Trainer):  # type: ignore[misc]
    """Replaces the training step by the defense's once `configure_defense` was called, and changes nothing before.

    Put it first among the bases. The defense calls back through `loss`, `train` and their siblings.
    """

    _defense: Defense | None = None
    streams: Streams | None = None
    answer_head: nn.Module | None = None
    _record: RunRecord | None = None

    def configure_defense(
        self, config: DefenseConfig, *, record: RunRecord, rows: Mapping[str, Sequence[Row]] | None = None
    ) -> None:
        """Switches the defense on for the training that follows.

        Args:
            config: Which defense, with its settings.
            record: Where the proof that it ran is kept.
            rows: Tokenized examples with `labels` for the keys of the recipe that the defense reads.

        Raises:
            ValueError: The model, the rows or the launch cannot work with these settings.
        """
        if self.args.n_gpu > 1:
            raise ValueError(
                "several GPUs in one process (DataParallel) cannot be defended. Launch one process per GPU, "
                "or set CUDA_VISIBLE_DEVICES to one."
            )
        model = self.accelerator.unwrap_model(self.model)
        self._defense = build_defense(config, model, seed=self.args.seed)
        self.answer_head = model.get_output_embeddings() if self._reads_answers_only(model) else None
        self._record = record
        self._safety_metrics = StepMetrics()
        self._last_step = -1
        self.streams = Streams(
            config,
            rows or {},
            self.data_collator,
            pad_id=getattr(self.processing_class, "pad_token_id", None) or 0,
            seed=self.args.seed,
            rank=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
        )

    def _reads_answers_only(self, model: nn.Module) -> bool:
        """Whether prompt tokens can be left out of the head; not where a loss of the host's own reads the logits."""
        has_own_loss = self.label_smoother is not None or self.compute_loss_func is not None
        return self.model_accepts_loss_kwargs and not has_own_loss and reads_answers_only(model)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One micro-batch of the defense, or the host's own when no defense is on."""
        if self._defense is None or self._record is None:
            return self.host_step(model, inputs, num_items_in_batch)
        step = self.state.global_step
        position = Position(step=step, starts_step=step != self._last_step, num_steps=self.state.max_steps)
        self._last_step = step
        host = TrainerHost(self, model, num_items_in_batch)
        report = self._defense.step(host, inputs, position)
        self._safety_metrics.add(report, starts_step=position.starts_step)
        self._record.add(report, position)
        return report.loss

    def host_step(self, model: nn.Module, batch: Batch, num_items: Tensor | int | None) -> Tensor:
        """The host trainer's own training step: forward, backward, detached loss."""
        loss: Tensor = super().training_step(model, dict(batch), num_items)
        return loss

    def auxiliary_loss(self, model: nn.Module, batch: Batch, num_items: Tensor | int | None) -> Tensor:
        """Loss of a pass that no metric of the host sees.

        Args:
            model: The wrapped model.
            batch: Model inputs, not yet on the device.
            num_items: Tokens of the whole optimizer step, where the host normalises by them.
        """
        loss = Trainer.compute_loss(self, model, dict(batch), num_items_in_batch=num_items)
        assert isinstance(loss, Tensor)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the `safety/*` metrics since the last training log."""
        if self._record is not None and "loss" in logs:
            metrics = self._safety_metrics.pop()
            logs.update(metrics)
            self._record.trace_step(self.state.global_step, {"loss": logs["loss"], **metrics})
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains; what an earlier run left in the output directory no longer counts from here on."""
        if self._record is not None:
            self._last_step = -1
            self._record.begin(
                Path(self.args.output_dir),
                resumed=bool(resume_from_checkpoint),
                write=self.is_world_process_zero(),
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._defense is not None and self._record is not None and self.args.should_save:
            save_state(Path(output_dir), defense=self._defense.state_dict(), record=self._record.state_dict())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None or self._defense is None or self._record is None:
            return
        state = load_state(Path(checkpoint))
        self._record.load_state_dict(state.record, step=self.state.global_step)
        self._defense.load_state_dict(state.defense)

    def _save_checkpoint(self, model: nn.Module, trial: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(model, trial, **kwargs)
        folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._seal(Path(self._get_output_dir(trial=trial), folder))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model, and beside it the proof that it was defended."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call:
            self._seal(Path(output_dir or self.args.output_dir))

    def _seal(self, model_dir: Path) -> None:
        if self._record is not None and model_dir.is_dir():
            self._record.seal(model_dir)
