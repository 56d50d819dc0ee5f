"""The defenses: one file each, read top to bottom against its paper."""

from __future__ import annotations

from torch import nn

from tvac_plugin.configs.base import DefenseConfig, Stream
from tvac_plugin.defenses.base import Batch, Defense, Host, Position, StepReport, trainable
from tvac_plugin.defenses.booster import Booster
from tvac_plugin.defenses.custom import defense_class
from tvac_plugin.defenses.lisa import Lisa
from tvac_plugin.defenses.random_noise import RandomNoise
from tvac_plugin.defenses.rep_noise import RepNoise
from tvac_plugin.defenses.t_vaccine import TVaccine
from tvac_plugin.defenses.tar import TAR
from tvac_plugin.defenses.vaccine import Vaccine

__all__ = [
    "DEFENSES", "TAR", "Batch", "Booster", "Defense", "DefenseConfig", "Host", "Lisa", "Position", "RandomNoise",
    "RepNoise", "StepReport", "Stream", "TVaccine", "Vaccine", "build_defense", "defense_name", "trainable",
]  # fmt: skip

DEFENSES: dict[type[DefenseConfig], type[Defense]] = {
    defense.config_class: defense for defense in (TVaccine, Vaccine, RandomNoise, RepNoise, TAR, Booster, Lisa)
}
"""The defenses of this package by the class of their settings."""


def build_defense(config: DefenseConfig, model: nn.Module, *, seed: int) -> Defense:
    """Binds the defense that `config` describes to `model`.

    Raises:
        ValueError: The model is too small for the settings, not a decoder whose layers can be found, or no defense
            has settings of this class.
    """
    return _class_of(config)(config, model, seed=seed)


def defense_name(config: DefenseConfig) -> str:
    """The value of `safety_defense:` that selects the defense of `config`: its name or its import path."""
    if type(config) in DEFENSES:
        return config.block
    defense = _class_of(config)
    return f"{defense.__module__}.{defense.__qualname__}"


def _class_of(config: DefenseConfig) -> type[Defense]:
    return DEFENSES.get(type(config)) or defense_class(config)
