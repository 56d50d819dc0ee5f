"""T-Vaccine (Liu et al., arXiv 2410.09760): only safety-critical layers are perturbed and trained.

    every K steps (probe)    s_l = ||dL(w; B_h) / de_l||,  p_l = s_l / sum over j of s_j
    every J steps (draw)     S = gamma different layers, drawn with probabilities p
    every step               g_l = dL(w; B) / de_l for l in S
                             eps_l = rho * g_l / sqrt(sum over j in S of ||g_j||^2)
                             train w_S on e_l + eps_l for l in S

e_l is the attention output of layer l, B a micro-batch of alignment data, B_h one of harmful data. Settings and their
symbols are described in `tvac_plugin.configs.perturbation.TVaccineConfig`.

Not in the paper is `layer_sampling: relative_gradient_norm`, with s_l = ||e_l|| * ||dL(w; B_h) / de_l||. A perturbation
of relative size t, eps_l = t * ||e_l|| * u with ||u|| = 1, changes L to first order by t * ||e_l|| * <dL / de_l, u>,
at most by t * s_l, with u along the gradient. If what makes e_l is multiplied by c and what reads it is divided by c,
the gradient is divided by c, and the paper's score with it, but not this one. `tvac_plugin.defenses.budget` has the
eps_l of `rho_scale: relative`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from logging import getLogger
from typing import Any

import torch
from torch import Tensor, nn

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.configs.perturbation import TVaccineConfig
from tvac_plugin.defenses.base import Defense, Host, Position, StepKind, StepReport
from tvac_plugin.defenses.layer_draws import (
    draw_layers,
    kinds_by_lowest_layer,
    layer_probabilities,
    uniform,
    with_probe,
)
from tvac_plugin.defenses.layer_probe import probe_layers, says_nothing
from tvac_plugin.defenses.learning_layers import LearningLayers
from tvac_plugin.defenses.two_pass import perturbed_step
from tvac_plugin.model.layer_checkpointing import can_checkpoint, checkpointed
from tvac_plugin.model.numerics import seed_of
from tvac_plugin.model.types import Batch

LOG = getLogger(__name__)
_NEVER = 10_000_000


class TVaccine(Defense):
    """Targeted Vaccine: probe, draw, perturb, train."""

    config_class = TVaccineConfig

    def __init__(self, config: TVaccineConfig, model: nn.Module, *, seed: int) -> None:
        """Binds the defense to `model`; what is drawn depends on `seed`, the scores and the step alone.

        Raises:
            UserError: The model has fewer layers than are to be drawn, or its layers are not found.
        """
        self._layers = LearningLayers(model, config, config.perturb, freeze=config.freeze)
        can_switch = all(can_checkpoint(block.layer) for block in self._layers.blocks)
        if config.checkpoint_inactive != "auto" and not can_switch:
            raise UserError(
                f"t_vaccine.checkpoint_inactive: the layers of {type(model).__name__} have no switch of their own. "
                "Set it to auto."
            )
        self._config = config
        self._refuse_untrainable()
        self._seed = seed
        self._num_probes = 0
        self._probabilities: Tensor | None = None
        self._active: tuple[int, ...] = ()

    def _refuse_untrainable(self) -> None:
        idle, freeze = self._layers.untrainable(), self._config.freeze
        if idle and freeze != "none":
            raise UserError(
                f"t_vaccine: nothing learns in layers {idle}, and with `freeze: {freeze}` only drawn layers learn. "
                "Train something in every layer, or set `t_vaccine.freeze: none`."
            )

    def step(self, host: Host, batch: Batch, position: Position) -> StepReport:
        """Probes and draws when they are due, then trains the drawn layers against their perturbation."""
        events = []
        if position.starts_step:
            if self._probe_is_due(position.step):
                events.append(self._probe(host))
            if not self._active or position.step % self._config.resample_steps == 0:
                events.append(self._draw(position.step))
        config = self._config
        with host.frozen(self._layers.at_rest(self._active)), checkpointed(self._checkpointing(self._active)):
            report = perturbed_step(
                host,
                batch,
                {index: self._layers.modules[index] for index in self._active},
                rho=config.rho,
                rho_scope=config.rho_scope,
                rho_scale=config.rho_scale,
                weights=self._layers.trainable,
                below=self._layers.below(self._active),
                share=config.perturbed_share,
            )
        report.events = events
        return report

    def _probe_is_due(self, step: int) -> bool:
        if self._config.layer_sampling == "uniform":
            return False
        return self._probabilities is None or step % self._config.probe_steps == 0

    def _probe(self, host: Host) -> dict[str, Any]:
        """Scores each layer by the gradient norm of its output on harmful data (p_l = s_l / sum s_j)."""
        is_relative = self._config.layer_sampling == "relative_gradient_norm"
        layers, batch = self._layers, host.batch("probe", self._num_probes)
        with checkpointed(self._checkpointing(())):
            probe = probe_layers(host, batch, layers.modules, weights=layers.trainable, output_norms=is_relative)
        self._num_probes += 1
        scores = probe.scores * probe.output_norms if is_relative else probe.scores
        if says_nothing(scores):
            LOG.warning(
                f"probe {self._num_probes}: its scores are zero or not finite, so layers are drawn uniformly until "
                "the next one. Look for harmful rows without an answer, or lower the learning rate."
            )
        self._probabilities = layer_probabilities(scores)
        return probe.event(scores=scores, probabilities=self._probabilities)

    def _draw(self, step: int) -> dict[str, Any]:
        """Draws S, the layers that are perturbed and trained until the next draw, without replacement."""
        count = self._config.num_active_layers
        probabilities = self._probabilities
        if probabilities is None:
            probabilities = uniform(len(self._layers.blocks))
        drawn = draw_layers(probabilities, count, self._config.layer_sampling, seed=seed_of(self._seed, step))
        self._active = tuple(sorted(drawn.tolist()))
        return {"event": "draw", "layers": list(self._active)}

    def _checkpointing(self, drawn: tuple[int, ...]) -> dict[nn.Module, bool]:
        """Which layers keep only their input in a pass, as `checkpoint_inactive` says; empty to leave them alone."""
        setting = self._config.checkpoint_inactive
        if setting == "auto":
            return {}
        blocks = self._layers.blocks
        layers = blocks if setting == "on" else [block for block in blocks if block.index not in drawn]
        return {block.layer: setting == "on" and block.index not in drawn for block in layers}

    @classmethod
    def step_kinds(
        cls, config: TVaccineConfig, num_layers: int, *, accumulation: int, probes: Sequence[Sequence[float]] = ()
    ) -> list[StepKind]:
        """Draws by their lowest layer, above which everything runs twice, and the probe.

        Where the other layers lie matters little, and they are spread evenly. What the probe finds cannot be known
        beforehand: without `probes` draws are taken for uniform. The probe's own step is taken with the costliest draw,
        and counts among the steps of that draw.
        """
        kinds = kinds_by_lowest_layer(config, num_layers, config.layer_sampling, probes=probes, state_of=cls._drawn)
        if config.layer_sampling == "uniform":
            return kinds
        undrawn = config.model_copy(update={"resample_steps": _NEVER})
        probed = 1 / (config.probe_steps * accumulation)
        return with_probe(kinds, StepKind(probed, undrawn, Position(1, starts_step=True), kinds[0].state))

    @staticmethod
    def _drawn(layers: Sequence[int]) -> dict[str, Any]:
        return {"num_probes": 1, "probabilities": None, "active_layers": list(layers)}

    def state_dict(self) -> dict[str, Any]:
        """Number of probes, probabilities and drawn layers."""
        probabilities = self._probabilities
        return {
            "num_probes": self._num_probes,
            "probabilities": None if probabilities is None else probabilities.tolist(),
            "active_layers": list(self._active),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        probabilities = state["probabilities"]
        self._num_probes = state["num_probes"]
        self._probabilities = None if probabilities is None else torch.tensor(probabilities).double()
        self._active = tuple(state["active_layers"])
