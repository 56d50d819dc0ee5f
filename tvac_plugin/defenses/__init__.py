"""The defenses: one file each, read top to bottom against its paper."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tvac_plugin.configs.base import DefenseConfig, Stream
from tvac_plugin.defenses.base import Defense, Host, Position, StepKind, StepReport, trainable
from tvac_plugin.defenses.booster import Booster
from tvac_plugin.defenses.circuit_breaker import CircuitBreaker
from tvac_plugin.defenses.crl import CRL
from tvac_plugin.defenses.ctrap import CTRAP
from tvac_plugin.defenses.custom import defense_class
from tvac_plugin.defenses.lisa import Lisa
from tvac_plugin.defenses.oasis import OASIS
from tvac_plugin.defenses.random_noise import RandomNoise
from tvac_plugin.defenses.rep_noise import RepNoise
from tvac_plugin.defenses.seam import SEAM
from tvac_plugin.defenses.t_vaccine import TVaccine
from tvac_plugin.defenses.tar import TAR
from tvac_plugin.defenses.vaccine import Vaccine
from tvac_plugin.model.numerics import norm
from tvac_plugin.model.types import Batch

__all__ = [
    "CRL", "CTRAP", "DEFENSES", "OASIS", "SEAM", "TAR", "Batch", "Booster", "CircuitBreaker", "Defense",
    "DefenseConfig", "Host", "Lisa", "Position", "RandomNoise", "RepNoise", "StepKind", "StepReport", "Stream",
    "TVaccine", "Vaccine", "build_defense", "defense_name", "norm", "step_kinds", "trainable",
]  # fmt: skip

DEFENSES: dict[type[DefenseConfig], type[Defense]] = {
    defense.config_class: defense
    for defense in (
        TVaccine,
        Vaccine,
        RandomNoise,
        OASIS,
        RepNoise,
        TAR,
        Booster,
        CTRAP,
        SEAM,
        CircuitBreaker,
        CRL,
        Lisa,
    )
}
"""The defenses of this package by the class of their settings."""


def build_defense(config: DefenseConfig, model: nn.Module, *, seed: int) -> Defense:
    """Binds the defense that `config` describes to `model`.

    Raises:
        UserError: The model is too small for the settings, not a decoder whose layers can be found, or no defense
            has settings of this class.
    """
    return _class_of(config)(config, model, seed=seed)


def step_kinds(
    config: DefenseConfig, num_layers: int, *, accumulation: int, probes: Sequence[Sequence[float]] = ()
) -> list[StepKind]:
    """The kinds of micro-batches that the defense of `config` takes on a model of `num_layers` layers.

    Args:
        config: The defense's settings.
        num_layers: Decoder layers of the model.
        accumulation: Micro-batches of an optimizer step.
        probes: Probabilities of all layers, for each probe of an earlier run; only if `config` draws layers.
    """
    known = {"probes": probes} if probes else {}  # a defense of the user's own may be older than the argument
    return _class_of(config).step_kinds(config, num_layers, accumulation=accumulation, **known)


def defense_name(config: DefenseConfig) -> str:
    """The value of `safety_defense:` that selects the defense of `config`: its name or its import path."""
    if type(config) in DEFENSES:
        return config.block
    defense = _class_of(config)
    return f"{defense.__module__}.{defense.__qualname__}"


def _class_of(config: DefenseConfig) -> type[Defense]:
    return DEFENSES.get(type(config)) or defense_class(config)
