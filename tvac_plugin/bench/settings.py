"""What to measure and how often, and the settings that each defense is measured with."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

from tvac_plugin.bench import DEFAULT_SEED
from tvac_plugin.bench.shape import Shape
from tvac_plugin.boundary.errors import UserError, did_you_mean
from tvac_plugin.configs import DEFENSE_CONFIGS
from tvac_plugin.configs.base import DefenseConfig
from tvac_plugin.recipes.safe_yaml import parse_document

MEASURED = [name for name, config in DEFENSE_CONFIGS.items() if config.stage == "alignment"]
"""The defenses of alignment, which SFT on alignment data is compared with."""


class Settings(BaseModel):
    """How a benchmark is taken.

    Attributes:
        defenses: Which to measure beside plain SFT and the plugin without a defense.
        changes: Settings of a defense that differ, by its name.
        repeats: Timed rounds; 0 counts without timing.
        warmup: Rounds before them.
        draws: Layer sets that T-Vaccine and OASIS are measured on.
        threads: CPU threads.
        host_metrics: Whether `SFTTrainer`'s token accuracy and entropy are computed, as they are by default.
        seed: Of weights, rows, drawn layers and the order of turns.
        probabilities: Of drawing each layer; `None` for uniform draws.
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
    probabilities: list[float] | None = None

    @field_validator("defenses")
    @classmethod
    def _refuse_unmeasured(cls, names: list[str]) -> list[str]:
        for name in names:
            if name in DEFENSE_CONFIGS and name not in MEASURED:
                raise UserError(
                    f"{name} defends while a user fine-tunes, so SFT on alignment data is nothing to compare it with. "
                    f"Use one of: {', '.join(MEASURED)}."
                )
            if name not in MEASURED:
                raise UserError(f"`{name}` is not a defense.{did_you_mean(name, MEASURED)}")
        return list(dict.fromkeys(names))


def parse_changes(texts: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Reads `DEFENSE.KEY=VALUE`, the value as YAML.

    Raises:
        UserError: One of them is written otherwise, or names no defense that is measured.
    """
    changes: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, dot, rest = text.partition(".")
        key, equals, value = rest.partition("=")
        if not (dot and equals):
            raise UserError(f"--set {text}: write DEFENSE.KEY=VALUE, for example t_vaccine.perturb=mlp.")
        if name not in MEASURED:
            raise UserError(f"--set {text}: `{name}` is not measured.{did_you_mean(name, MEASURED)}")
        changes.setdefault(name, {})[key] = _value(text, value)
    return changes


def _value(text: str, value: str) -> Any:
    try:
        return parse_document(value)
    except UserError as error:
        raise UserError(f"--set {text}: {error}") from error


def defense_settings(name: str, shape: Shape, settings: Settings) -> DefenseConfig:
    """The settings a defense is measured with: its defaults, its own for a benchmark on this shape, and the changes.

    Raises:
        pydantic.ValidationError: The changes do not fit the defense.
    """
    config_class = DEFENSE_CONFIGS[name]
    fitted = config_class.for_benchmark(rows=shape.batch_size, layers=shape.num_active_layers)
    return config_class.model_validate(fitted | settings.changes.get(name, {}))
