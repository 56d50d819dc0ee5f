"""Vaccine (Huang et al., arXiv 2402.01109): every layer is perturbed and everything trains."""

from __future__ import annotations

from torch import nn

from tvac_plugin.configs.perturbation import VaccineConfig
from tvac_plugin.defenses.base import Defense, Host, Position, StepReport, trainable
from tvac_plugin.defenses.two_pass import perturbed_step
from tvac_plugin.model.architecture import find_blocks
from tvac_plugin.model.types import Batch


class Vaccine(Defense):
    """Perturbation-aware alignment over all layers (section 3, equations 2 to 5).

    Each micro-batch: g_l = dL/de_l at every layer; eps_l = rho * g_l / ||(g_1, ..., g_L)||; train on e_l + eps_l.
    `tvac_plugin.defenses.budget` has the eps_l of `rho_scale: relative`, which is not in the paper.
    """

    config_class = VaccineConfig

    def __init__(self, config: VaccineConfig, model: nn.Module, *, seed: int) -> None:
        """Binds the defense to `model`; `seed` is unused, there is nothing random in it."""
        self._config = config
        self._modules = {block.index: block.module(config.perturb) for block in find_blocks(model)}
        self._trainable = trainable(model)

    def step(self, host: Host, batch: Batch, position: Position) -> StepReport:
        """One micro-batch in two passes."""
        config = self._config
        return perturbed_step(
            host,
            batch,
            self._modules,
            rho=config.rho,
            rho_scope=config.rho_scope,
            rho_scale=config.rho_scale,
            weights=self._trainable,
            share=config.perturbed_share,
        )
