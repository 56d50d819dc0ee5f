"""Tiny runs of `SafetyDefenseSFTTrainer` under any defense, which can be killed on the way."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback
from trl import SFTConfig

from tests.support.models import tiny_model, with_lora
from tvac_plugin import SafetyDefenseSFTTrainer
from tvac_plugin.configs.base import DefenseConfig, Stream
from tvac_plugin.defenses import Defense, Host, Position, StepReport
from tvac_plugin.model.types import Batch
from tvac_plugin.tiny_world.base_model import build_tokenizer
from tvac_plugin.tiny_world.language import REFUSAL, World

WORLD = World.create(seed=0, num_hazards=24, num_benign=6)
ARTEFACTS = ("safety_trace.jsonl", "safety_defense.json", "adapter_model.safetensors")


class DriftConfig(DefenseConfig):
    """Settings of `Drift`."""

    scale: float = 0.01

    def streams(self) -> Mapping[str, Stream]:
        return {"harmful": Stream("harmful_datasets", 2)}


class Drift(Defense):
    """A defense of one's own, whose next step depends on a tensor, a number and harmful data."""

    config_class = DriftConfig

    def __init__(self, config: DriftConfig, model: nn.Module, *, seed: int) -> None:
        self.scale = config.scale
        self.weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.mean = torch.zeros(())
        self.count = 0

    def step(self, host: Host, batch: Batch, position: Position) -> StepReport:
        if position.starts_step:
            with host.auxiliary():
                loss = host.mean_loss(host.batch("harmful", position.step)).detach()
            self.mean = 0.9 * self.mean + 0.1 * loss
            self.count += 1
            push = [self.scale * self.mean / self.count * torch.ones_like(weight) for weight in self.weights]
            host.add_gradients(self.weights, push)
        return StepReport(loss=host.train(batch), norms={"push": self.mean})

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.mean, self.count = state["mean"], state["count"]


def chats(things: Any, *, refuse: bool) -> Dataset:
    """Rows with a prompt and its answer."""
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": thing.question}],
                "completion": [{"role": "assistant", "content": REFUSAL if refuse else thing.answer}],
            }
            for thing in things
        ]
    )


def build(output: Path, defense: DefenseConfig | None, **changes: Any) -> SafetyDefenseSFTTrainer:
    """A trainer of seven steps in three epochs, with an uneven last step in each; logs and saves in between."""
    settings: dict[str, Any] = {
        "max_steps": 7,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 3,
        "save_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "loss_type": "nll",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    tokenizer = build_tokenizer(WORLD)
    model = changes.pop("model", None) or with_lora(
        tiny_model(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1), dropout=0.3
    )
    hazards = WORLD.hazards
    data: dict[str, Any] = {
        "train_dataset": chats(hazards[:10], refuse=True),
        "harmful_dataset": chats(hazards[10:20], refuse=False),
        "refusal_dataset": chats(hazards[10:20], refuse=True),
        "retain_dataset": chats(WORLD.benign, refuse=False),
        "alignment_dataset": chats(hazards[20:], refuse=True),
    }
    data |= {key: changes.pop(key) for key in list(changes) if key in data}
    callbacks = changes.pop("callbacks", None)
    return SafetyDefenseSFTTrainer(
        model=model,
        args=SFTConfig(str(output), **settings | changes),
        processing_class=tokenizer,
        defense=defense,
        callbacks=callbacks,
        **data,
    )


def finish(output: Path, defense: DefenseConfig, *, resume: bool | str | None = None, **changes: Any) -> Path:
    """Trains to the end and saves the model."""
    run = build(output, defense, **changes)
    run.train(resume_from_checkpoint=resume)
    run.save_model()
    return output


def logs(run: SafetyDefenseSFTTrainer) -> list[dict[str, Any]]:
    """The trainer's own log, without what the clock says and the line at the end."""
    return [
        {key: log[key] for key in log if key in ("step", "loss", "grad_norm") or key.startswith("safety/")}
        for log in run.state.log_history[:-1]
    ]


class At(TrainerCallback):
    """Does something when the trainer reports `event` at `step`."""

    def __init__(self, event: str, step: int, action: Callable[[], None]) -> None:
        def on_event(_args: Any, state: Any, _control: Any, **_: Any) -> None:
            if state.global_step == step:
                action()

        setattr(self, event, on_event)


def kill() -> None:
    """What `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def in_child(function: Callable[[], Any]) -> int:
    """Calls `function` in a forked process; returns how that ended, as `os.waitstatus_to_exitcode` does."""
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(output: Path) -> dict[str, bytes]:
    """What two runs must have in common, byte for byte."""
    return {name: (output / name).read_bytes() for name in ARTEFACTS}
