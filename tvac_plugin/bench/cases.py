"""What is compared: SFT without the plugin, with it but no defense, and each defense, all on one model and batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from tvac_plugin.bench.settings import Settings, defense_settings
from tvac_plugin.bench.shape import Shape, build_model, random_batch, random_rows, word_tokenizer
from tvac_plugin.configs.base import DATA_KEYS, DefenseConfig
from tvac_plugin.configs.perturbation import LayerSampling
from tvac_plugin.defenses import Defense
from tvac_plugin.defenses.layer_draws import draw_layers, uniform
from tvac_plugin.model.numerics import seed_of
from tvac_plugin.model.types import Batch
from tvac_plugin.trainers.sft import SafetyDefenseSFTTrainer

PLAIN, OFF = "sft", "plugin off"


class _PlainWithoutMetrics(SFTTrainer):  # type: ignore[misc]
    compute_loss = Trainer.compute_loss


class _DefendedWithoutMetrics(SafetyDefenseSFTTrainer):
    compute_loss = Trainer.compute_loss
    reads_logits = False


@dataclass(frozen=True)
class Case:
    """One way to take a training step.

    Attributes:
        trainer: Takes it.
        batch: The batch it is taken on, the same for all cases.
        config: The defense's settings, `None` without one.
        num_draws: How many different steps there are: the layer sets of a defense that draws layers, else 1.
        states: The defense's state in each of these steps, where probes alone draw its layers; else none.
    """

    trainer: Any
    batch: Batch
    config: DefenseConfig | None
    num_draws: int
    states: Sequence[dict[str, Any]] = ()

    @property
    def model(self) -> nn.Module:
        """The model, shared by all cases."""
        model: nn.Module = self.trainer.model
        return model

    def step(self, draw: int) -> Tensor:
        """Forward and backward of the `draw`-th optimizer step, without the optimizer; returns the loss."""
        trainer = self.trainer
        trainer.state.global_step = draw
        if self.states:
            trainer.state.global_step = 1  # no probe is due there
            trainer._defense.load_state_dict(self.states[draw])
        if self.config is not None:
            trainer._last_step = -1  # or the defense would take a repeated draw for a later micro-batch of its step
        num_items = (self.batch["labels"][:, 1:] != -100).sum().to(trainer.args.device)
        loss: Tensor = trainer.training_step(self.model, dict(self.batch), num_items)
        return loss

    def active_layers(self) -> list[int]:
        """The layers that the last step's defense drew; none if it draws none."""
        draws = self.config is not None and self.config.draws_layers
        return list(self.trainer._defense.state_dict()["active_layers"]) if draws else []

    def clear(self) -> None:
        """Drops gradients, as an optimizer would."""
        self.model.zero_grad(set_to_none=True)

    def digest(self, loss: Tensor) -> str:
        """Hash of the loss and of all gradients, bit for bit."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        parts = [tensor.detach().cpu().contiguous().view(torch.uint8) for tensor in (loss.reshape(1), *gradients)]
        return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()


@contextmanager
def built_cases(shape: Shape, settings: Settings) -> Iterator[dict[str, Case]]:
    """All cases by name, SFT first; what their trainers write is removed at the end."""
    model = build_model(shape, seed=settings.seed)
    batch = random_batch(shape, seed=settings.seed)
    plain, ours = (
        (SFTTrainer, SafetyDefenseSFTTrainer)
        if settings.host_metrics
        else (_PlainWithoutMetrics, _DefendedWithoutMetrics)
    )
    with TemporaryDirectory() as folder:
        common = {
            "model": model,
            "train_dataset": random_rows(shape, shape.batch_size, seed=settings.seed),
            "processing_class": word_tokenizer(shape),
        }

        def case(cls: type, config: DefenseConfig | None = None, **extra: Any) -> Case:
            trainer = cls(args=_arguments(shape, settings, Path(folder)), **common, **extra)
            trainer.current_gradient_accumulation_steps = 1
            trainer.state.max_steps = trainer.args.max_steps
            num_draws = settings.draws if config is not None and config.draws_layers else 1
            return Case(trainer, batch, config, num_draws)

        cases = {PLAIN: case(plain), OFF: case(ours)}
        for name in settings.defenses:
            config = defense_settings(name, shape, settings)
            cases[name] = case(ours, config, defense=config, **_data(shape, settings, config))
            defense = cases[name].trainer._defense
            if states := _states(defense, shape, settings):
                cases[name] = replace(cases[name], states=states)
            elif config.draws_layers and settings.probabilities is not None:
                defense.load_state_dict(defense.state_dict() | {"probabilities": settings.probabilities})
        yield cases


def _states(defense: Defense, shape: Shape, settings: Settings) -> list[dict[str, Any]]:
    """A state for each draw, of layers with the highest probabilities or, without any, at random; none if it draws."""
    known = settings.probabilities is not None
    scores = torch.tensor(settings.probabilities).double() if known else uniform(shape.num_layers)
    sampling: LayerSampling = "top_k" if known else "uniform"
    seeds = [seed_of(settings.seed, draw) for draw in range(settings.draws)]
    drawn = [draw_layers(scores, shape.num_active_layers, sampling, seed=seed) for seed in seeds]
    states = [defense.state_with(sorted(layers.tolist())) for layers in drawn]
    return [state for state in states if state is not None]


def _arguments(shape: Shape, settings: Settings, folder: Path) -> SFTConfig:
    return SFTConfig(
        str(folder),
        per_device_train_batch_size=shape.batch_size,
        loss_type=shape.loss_type,
        seed=settings.seed,
        max_steps=1000,
        max_length=shape.sequence_len,
        use_cpu=shape.device == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def _data(shape: Shape, settings: Settings, config: DefenseConfig) -> dict[str, Any]:
    """Random rows for each key that the defense requires; harmful rows and refusals have the same prompts."""
    return {
        key.removesuffix("s"): random_rows(
            shape, 8 * shape.batch_size, seed=settings.seed + 1, answer_seed=settings.seed + 10 + number
        )
        for number, key in enumerate(DATA_KEYS)
        if config.data_keys().get(key)
    }
