"""Where a run goes on, and the trainer's own state that its checkpoints leave out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import IntervalStrategy, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.trainers.checkpoint import newest_complete


def checkpoint_to_resume(requested: str | bool | None, output_dir: Path) -> Path | None:
    """The checkpoint that `Trainer.train(resume_from_checkpoint=requested)` means; `None` to start anew.

    Raises:
        UserError: Any checkpoint will do, and there is no complete one.
    """
    if requested is True:
        newest = newest_complete(output_dir)
        if newest is None:
            raise UserError(f"{output_dir}: no complete checkpoint to resume from. Start anew without resuming.")
        return newest
    return Path(str(requested)) if requested else None


def loss_window(trainer: Trainer) -> dict[str, Any]:
    """What the trainer has summed up since its last log; without it the first loss logged after resuming is another."""
    return {
        "tr_loss": float(trainer._tr_loss),
        "total_loss": trainer._total_loss_scalar,
        "last_logged": trainer._globalstep_last_logged,
    }


def restore_loss_window(trainer: Trainer, window: Mapping[str, Any]) -> None:
    """Restores `loss_window`."""
    trainer._tr_loss.fill_(window["tr_loss"])
    trainer._total_loss_scalar = window["total_loss"]
    trainer._globalstep_last_logged = window["last_logged"]
    trainer._initial_global_step = 0  # newer versions divide the total by the steps since it


class ExactResume(TrainerCallback):  # type: ignore[misc]
    """Makes a resumed run's state and logs those of the run that was not stopped."""

    def __init__(self, restore: Callable[[], None]) -> None:
        """Serves one trainer, whose defense `restore` puts where the checkpoint left it."""
        self._restore = restore

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Restores the defense when the trainer has restored itself, before any step and even if no step is left."""
        self._restore()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Logs an epoch at its last step, before that step's checkpoint: a resumed run begins with the next epoch."""
        is_last = float(state.epoch).is_integer() or control.should_training_stop
        if is_last and args.logging_strategy == IntervalStrategy.EPOCH:
            control.should_log = True
