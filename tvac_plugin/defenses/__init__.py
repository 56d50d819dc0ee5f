"""The defenses: one file each, read top to bottom against its paper."""

from __future__ import annotations

from torch import nn

from tvac_plugin.args import DefenseConfig, TVaccineConfig, VaccineConfig
from tvac_plugin.defenses.base import Defense
from tvac_plugin.defenses.t_vaccine import TVaccine
from tvac_plugin.defenses.vaccine import Vaccine

__all__ = ["Defense", "TVaccine", "Vaccine", "build_defense"]


def build_defense(config: DefenseConfig, model: nn.Module, *, seed: int) -> Defense:
    """Binds the defense that `config` describes to `model`.

    Raises:
        ValueError: The model is too small for the settings, or not a decoder whose layers can be found.
    """
    match config:
        case TVaccineConfig():
            return TVaccine(config, model, seed=seed)
        case VaccineConfig():
            return Vaccine(config, model, seed=seed)
    raise AssertionError(f"no defense for {type(config).__name__}")
