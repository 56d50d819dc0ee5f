"""The blocks of a recipe: every setting with its bounds, its default and where the default comes from."""

from __future__ import annotations

from tvac_plugin.configs.base import DefenseConfig
from tvac_plugin.configs.collapse import CTRAPConfig, SEAMConfig
from tvac_plugin.configs.fine_tuning import LisaConfig
from tvac_plugin.configs.perturbation import OASISConfig, RandomNoiseConfig, TVaccineConfig, VaccineConfig
from tvac_plugin.configs.representations import CircuitBreakerConfig, CRLConfig
from tvac_plugin.configs.unlearning import BoosterConfig, RepNoiseConfig, TARConfig

DEFENSE_CONFIGS: dict[str, type[DefenseConfig]] = {
    config.block: config
    for config in (
        TVaccineConfig, VaccineConfig, RandomNoiseConfig, OASISConfig, RepNoiseConfig, TARConfig, BoosterConfig,
        CTRAPConfig, SEAMConfig, CircuitBreakerConfig, CRLConfig, LisaConfig,
    )
}  # fmt: skip
"""Every defense by the value of `safety_defense:` that selects it."""
