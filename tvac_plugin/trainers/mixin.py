"""A defense inside any `transformers.Trainer`: the mixin is the trainer's side of the seam in `defenses.base`."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from logging import getLogger
from pathlib import Path
from typing import Any

from accelerate import DistributedType
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.boundary.files import lock_output
from tvac_plugin.configs.base import DefenseConfig
from tvac_plugin.data.streams import Streams, TokenizedRow
from tvac_plugin.defenses import Defense, build_defense
from tvac_plugin.defenses.base import Position, trainable
from tvac_plugin.model.adapters import refuse_prompt_learning, refuse_silent_adapters
from tvac_plugin.model.answer_head import AnswerHead, find_answer_head
from tvac_plugin.model.four_bit import kept_trainable, refuse_packed
from tvac_plugin.model.types import Batch
from tvac_plugin.provenance.record import RunRecord
from tvac_plugin.trainers.checkpoint import (
    CheckpointState,
    abandon_checkpoint,
    begin_checkpoint,
    load_state,
    load_window,
    save_state,
    save_window,
)
from tvac_plugin.trainers.host import TrainerHost
from tvac_plugin.trainers.interrupts import held_interrupts
from tvac_plugin.trainers.metrics import IDLE, StepMetrics
from tvac_plugin.trainers.reduction import mean_across_processes
from tvac_plugin.trainers.resume import ExactResume, checkpoint_to_resume, loss_window, restore_loss_window

LOG = getLogger(__name__)


class SafetyDefenseMixin(Trainer):  # type: ignore[misc]
    """Replaces the training step by the defense's once `configure_defense` was called, and changes nothing before.

    Put it first among the bases. The defense calls back through `loss`, `train` and their siblings.
    """

    _defense: Defense | None = None
    streams: Streams | None = None
    answer_head: AnswerHead | None = None
    reads_logits = True
    """Whether `compute_loss` looks at the model's logits."""
    _record: RunRecord | None = None
    _resumed_from: Path | None = None
    _resumed: CheckpointState | None = None
    _warned_of_idle = False

    def configure_defense(
        self, config: DefenseConfig, *, record: RunRecord, rows: Mapping[str, Sequence[TokenizedRow]] | None = None
    ) -> None:
        """Switches the defense on for the training that follows.

        Args:
            config: Which defense, with its settings.
            record: Where the proof that it ran is kept.
            rows: Tokenized examples with `labels` for the keys of the recipe that the defense reads.

        Raises:
            UserError: The model, the rows or the launch cannot work with these settings.
        """
        self._refuse_launch()
        for advice in config.advice(rows or {}):
            LOG.warning(advice)
        model = self.accelerator.unwrap_model(self.model)
        refuse_packed(model)
        refuse_prompt_learning(model)
        refuse_silent_adapters(model)
        self._defense = build_defense(config.with_tokenizer(self.processing_class), model, seed=self.args.seed)
        self.answer_head = self._find_answer_head(model)
        self._first_state = copy.deepcopy(self._defense.state_dict())
        self.add_callback(ExactResume(self._restore_defense))
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

    def _find_answer_head(self, model: nn.Module) -> AnswerHead | None:
        """The head, if prompt tokens can be left out of it; not where a loss of the host's own reads the logits."""
        has_own_loss = self.label_smoother is not None or self.compute_loss_func is not None
        if has_own_loss or not self.model_accepts_loss_kwargs:
            return None
        with self.accelerator.autocast():
            return find_answer_head(model)

    def _refuse_launch(self) -> None:
        if self.args.n_gpu > 1:
            raise UserError(
                "several GPUs in one process (DataParallel) cannot be defended. Launch one process per GPU, "
                "or set CUDA_VISIBLE_DEVICES to one."
            )
        launch = self.accelerator.distributed_type
        if launch in (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM):
            raise UserError(
                f"{launch.value} was asked for by the launch or the training arguments and cannot be defended: "
                "docs/reference/support-matrix.md says why. Launch one process per GPU without it, which is DDP."
            )

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
        with held_interrupts():
            report = self._defense.step(host, inputs, position)
            report.lost = host.lost()
            host.finish_step()
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
            metrics = self._safety_metrics.pop(lambda values: mean_across_processes(self.accelerator, [values])[0])
            logs.update(metrics)
            self._record.trace_step(self.state.global_step, {"loss": logs["loss"], **metrics})
            self._warn_of_idle(metrics)
        super().log(logs, start_time)

    def _warn_of_idle(self, metrics: Mapping[str, float]) -> None:
        if metrics.get(IDLE) and not self._warned_of_idle:
            self._warned_of_idle = True
            LOG.warning(
                f"step {self.state.global_step}: the defense did nothing in {metrics[IDLE]:.0f} batches since the last "
                "log, because what it would have added was zero or not finite. If the loss is not finite either, "
                f"lower the learning rate; else look for rows without an answer. {IDLE} counts them from here on."
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains; no other run may write to the output directory meanwhile.

        Raises:
            UserError: Another run writes there, or nothing can be written.
            UserError: The checkpoint is of another run or number of processes, incomplete or damaged; or the model's
                weights cannot learn.
        """
        if self._record is None:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        refuse_packed(self.model)
        output_dir = Path(self.args.output_dir)
        locked = lock_output(output_dir) if self.is_world_process_zero() else contextlib.nullcontext()
        with locked, kept_trainable(self.model):
            checkpoint = checkpoint_to_resume(resume_from_checkpoint, output_dir)
            self._resumed_from = checkpoint
            self._resumed = None
            if checkpoint is not None:
                self._resumed = load_state(checkpoint, num_processes=self.accelerator.num_processes)
                self._record.refuse_other_run(self._resumed.record, checkpoint=checkpoint)
                self._window = load_window(checkpoint, rank=self.args.process_index)
            done = super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
            self._record.look(self._trainable(), is_last=True)
            self._record.look_at_log(self.state.log_history, is_last=True)
            return done

    def _trainable(self) -> list[nn.Parameter]:
        return trainable(self.accelerator.unwrap_model(self.model))

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Starts the record anew, also when the loop is run again with smaller batches."""
        if self._defense is not None and self._record is not None:
            self._last_step = -1
            self._safety_metrics = StepMetrics()
            self._defense.load_state_dict(copy.deepcopy(self._first_state))
            self._record.begin(
                Path(self.args.output_dir),
                resumed=self._resumed is not None,
                write=self.is_world_process_zero(),
                weights=self._trainable(),
            )
        return super()._inner_training_loop(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The trainer would take one step more after resuming from the checkpoint of the last step."""
        if self._defense is not None and self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _restore_defense(self) -> None:
        """Puts the defense, its record and its metrics where the checkpoint left them."""
        if self._resumed_from is None or self._resumed is None or self._defense is None or self._record is None:
            return
        self._defense.load_state_dict(self._resumed.defense)
        self._record.load_state_dict(self._resumed.record, trace_from=self._resumed_from.parent)
        restore_loss_window(self, self._window["loss"])
        self._safety_metrics.load_state_dict(self._window["metrics"])

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._defense is None or self._record is None:
            return
        if self.args.should_save:
            save_state(
                Path(output_dir),
                defense=self._defense.state_dict(),
                record=self._record.state_dict(),
                num_processes=self.accelerator.num_processes,
            )
        window = {"loss": loss_window(self), "metrics": self._safety_metrics.state_dict()}
        save_window(Path(output_dir), rank=self.args.process_index, window=window)
        self.accelerator.wait_for_everyone()  # the file that makes it complete comes next, from one process

    def _save_checkpoint(self, model: nn.Module, trial: Any, **kwargs: Any) -> None:
        folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with self._whole_or_absent(Path(self._get_output_dir(trial=trial), folder)):
            super()._save_checkpoint(model, trial, **kwargs)

    @contextlib.contextmanager
    def _whole_or_absent(self, checkpoint: Path) -> Iterator[None]:
        if self._record is None:
            yield
            return
        if self.args.should_save:
            begin_checkpoint(checkpoint)
        self.accelerator.wait_for_everyone()  # no process writes beside the file that made an old one complete
        try:
            yield
        except BaseException as error:
            if self.args.should_save:
                abandon_checkpoint(checkpoint)
            if isinstance(error, RuntimeError) and "unexpected pos" in str(error):  # what torch says of a full disk
                raise UserError(f"{checkpoint}: the disk is full. Make room, and resume from the last one.") from error
            raise

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model, and beside it the proof that it was defended."""
        super().save_model(output_dir, _internal_call)
        model_dir = Path(output_dir or self.args.output_dir)
        if self._record is not None and model_dir.is_dir():
            self._record.look(self._trainable())
            self._record.look_at_log(self.state.log_history)
            self._record.seal(model_dir)
