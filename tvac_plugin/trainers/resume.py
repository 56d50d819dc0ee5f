"""Where a run goes on, and the trainer's own state that its checkpoints leave out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import IntervalStrategy, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tvac_plugin.trainers.checkpoint import newest_complete

if TYPE_CHECKING:
    from tvac_plugin.trainers.mixin import SafetyDefenseMixin


def checkpoint_to_resume(requested: str | bool | None, output_dir: Path) -> Path | None:
    """The checkpoint that `Trainer.train(resume_from_checkpoint=requested)` means; `None` to start anew.

    Raises:
        ValueError: Any checkpoint will do, and there is no complete one.
    """
    if requested is True:
        newest = newest_complete(output_dir)
        if newest is None:
            raise ValueError(f"{output_dir}: no complete checkpoint to resume from. Start anew without resuming.")
        return newest
    return Path(str(requested)) if requested else None


def loss_window(trainer: SafetyDefenseMixin) -> dict[str, Any]:
    """What the trainer has summed up since its last log; without it the first loss logged after resuming is another."""
    return {
        "tr_loss": float(trainer._tr_loss),
        "total_loss": trainer._total_loss_scalar,
        "last_logged": trainer._globalstep_last_logged,
    }


def restore_loss_window(trainer: SafetyDefenseMixin, window: Mapping[str, Any]) -> None:
    """Restores `loss_window`."""
    trainer._tr_loss.fill_(window["tr_loss"])
    trainer._total_loss_scalar = window["total_loss"]
    trainer._globalstep_last_logged = window["last_logged"]


class ExactResume(TrainerCallback):  # type: ignore[misc]
    """Makes a resumed run's state and logs those of the run that was not stopped."""

    def __init__(self, trainer: SafetyDefenseMixin) -> None:
        """Serves one trainer."""
        self._trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Restores the defense when the trainer has restored itself, before any step and even if no step is left."""
        self._trainer.restore_defense()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Logs an epoch at its last step, before that step's checkpoint: a resumed run begins with the next epoch."""
        is_last = float(state.epoch).is_integer() or control.should_training_stop
        if is_last and args.logging_strategy == IntervalStrategy.EPOCH:
            control.should_log = True
