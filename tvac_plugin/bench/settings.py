"""What to measure and how often, and the settings that each defense is measured with."""

from __future__ import annotations

from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, field_validator

from tvac_plugin.args import DEFENSE_CONFIGS
from tvac_plugin.bench import DEFAULT_SEED
from tvac_plugin.bench.shape import Shape
from tvac_plugin.configs.base import DefenseConfig, did_you_mean

MEASURED = [name for name, config in DEFENSE_CONFIGS.items() if config.stage == "alignment"]
"""The defenses of alignment, which SFT on alignment data is compared with."""

TAR_INNER_STEPS = 4


class Settings(BaseModel):
    """How a benchmark is taken.

    Attributes:
        defenses: Which to measure beside plain SFT and the plugin without a defense.
        changes: Settings of a defense that differ, by its name.
        repeats: Timed rounds; 0 counts without timing.
        warmup: Rounds before them.
        draws: Layer sets that T-Vaccine is measured on.
        threads: CPU threads.
        host_metrics: Whether `SFTTrainer`'s token accuracy and entropy are computed, as they are by default.
        seed: Of weights, rows, drawn layers and the order of turns.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    defenses: list[str] = MEASURED
    changes: dict[str, dict[str, Any]] = {}
    repeats: int = 5
    warmup: int = 1
    draws: int = 8
    threads: int = 2
    host_metrics: bool = True
    seed: int = DEFAULT_SEED

    @field_validator("defenses")
    @classmethod
    def _refuse_unmeasured(cls, names: list[str]) -> list[str]:
        for name in names:
            if name in DEFENSE_CONFIGS and name not in MEASURED:
                raise ValueError(
                    f"{name} defends while a user fine-tunes, so SFT on alignment data is nothing to compare it with. "
                    f"Use one of: {', '.join(MEASURED)}."
                )
            if name not in MEASURED:
                raise ValueError(f"`{name}` is not a defense.{did_you_mean(name, MEASURED)}")
        return list(dict.fromkeys(names))


def parse_changes(texts: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Reads `DEFENSE.KEY=VALUE`, the value as YAML.

    Raises:
        ValueError: One of them is written otherwise, or names no defense that is measured.
    """
    changes: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, dot, rest = text.partition(".")
        key, equals, value = rest.partition("=")
        if not (dot and equals):
            raise ValueError(f"--set {text}: write DEFENSE.KEY=VALUE, for example t_vaccine.perturb=mlp.")
        if name not in MEASURED:
            raise ValueError(f"--set {text}: `{name}` is not measured.{did_you_mean(name, MEASURED)}")
        changes.setdefault(name, {})[key] = yaml.safe_load(value)
    return changes


def defense_settings(name: str, shape: Shape, settings: Settings) -> DefenseConfig:
    """The settings a defense is measured with: its defaults, but for what follows from the shape.

    T-Vaccine draws uniformly and at every step, so that the mean over steps is the mean over draws. Batches beside the
    training batch have as many rows as that. TAR's adversary takes 4 steps instead of 64.

    Raises:
        pydantic.ValidationError: The changes do not fit the defense.
    """
    rows = shape.batch_size
    fitted: dict[str, dict[str, Any]] = {
        "t_vaccine": {
            "num_active_layers": shape.num_active_layers,
            "layer_sampling": "uniform",
            "resample_steps": 1,
            "probe_batch_size": rows,
        },
        "rep_noise": {"batch_size": rows},
        "tar": {"inner_steps": TAR_INNER_STEPS, "batch_size": rows, "adversary_batch_size": rows},
        "booster": {"batch_size": rows},
    }
    return DEFENSE_CONFIGS[name].model_validate(fitted.get(name, {}) | settings.changes.get(name, {}))
