"""OASIS (Tang et al., ACL 2026, long paper 1310): the perturbation leaves out the direction of harmful data.

    every K steps (probe)    d_l = dL(w; B_h) / de_l for every layer l
                             S   = the k layers with the largest ||d_l||
                             m_l = mean of d_l over the tokens of B_h, padding left out
    every step               g_l   = dL(w; B) / de_l for l in S
                             eps_l = rho * g_l / sqrt(sum over j in S of ||g_j||^2)
                             eps_l = eps_l - <eps_l, m_l> / ||m_l||^2 * m_l    at every token
                             train w_S on e_l + eps_l for l in S

e_l is the attention output of layer l, B a micro-batch of alignment data, B_h one of harmful data. The length of m_l
cancels, so only its direction is kept. Settings and their symbols are described in
`tvac_plugin.configs.perturbation.OASISConfig`; the equations are those of the published code, `class OASIS` in
`trainer.py` of github.com/xiaoroyi/OASIS.

What is left of eps has a norm below rho. `renormalise` takes g_l - <g_l, m_l> / ||m_l||^2 * m_l for g_l instead, whose
eps_l has the norm rho and raises L most, to first order, among all that are orthogonal to m_l and within the budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from logging import getLogger
from typing import Any

import torch
from torch import Tensor, nn

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.configs.perturbation import OASISConfig
from tvac_plugin.defenses.base import Defense, Host, Position, StepKind, StepReport
from tvac_plugin.defenses.layer_draws import kinds_by_lowest_layer, layer_probabilities, with_probe
from tvac_plugin.defenses.layer_probe import probe_layers, says_nothing
from tvac_plugin.defenses.learning_layers import LearningLayers
from tvac_plugin.defenses.two_pass import Worst, perturbed_step
from tvac_plugin.model.numerics import precise
from tvac_plugin.model.types import Batch

LOG = getLogger(__name__)
_SUMMED = 16
"""By how many units in the last place a long sum may be off."""


class OASIS(Defense):
    """Orthogonal and adaptive safety alignment: probe, choose, perturb without the harmful direction, train."""

    config_class = OASISConfig

    def __init__(self, config: OASISConfig, model: nn.Module, *, seed: int) -> None:
        """Binds the defense to `model`; `seed` is unused, the batches are seeded.

        Raises:
            UserError: The model has fewer layers than are to be chosen, its layers are not found, or nothing learns in
                one of them.
        """
        self._config = config
        self._layers = LearningLayers(model, config, config.perturb)
        if idle := self._layers.untrainable():
            raise UserError(
                f"oasis: nothing learns in layers {idle}, and only chosen layers learn. Train something in every layer."
            )
        self._num_probes = 0
        self._directions: dict[int, Tensor] = {}

    def step(self, host: Host, batch: Batch, position: Position) -> StepReport:
        """Probes when that is due, then trains the chosen layers against what is left of their perturbation."""
        is_due = not self._directions or position.step % self._config.probe_steps == 0
        events = self._probe(host) if position.starts_step and is_due else []
        report = self._perturbed(host, batch) if self._directions else _undefended(host, batch)
        report.events = events
        return report

    def _probe(self, host: Host) -> list[dict[str, Any]]:
        """Chooses S, and the directions m_l / ||m_l|| of its layers; a probe that says nothing leaves them.

        Of layers with one score those stay that are in S already.
        """
        batch, layers = host.batch("probe", self._num_probes), self._layers
        probe = probe_layers(host, batch, layers.modules, weights=layers.trainable, directions=True)
        self._num_probes += 1
        found = probe.event(scores=probe.scores, probabilities=layer_probabilities(probe.scores))
        if says_nothing(probe.scores):
            LOG.warning(
                f"probe {self._num_probes}: its scores are zero or not finite. Layers and directions stay as they "
                "were, and before the first ones nothing is defended. Look for harmful rows without an answer, or "
                "lower the learning rate."
            )
            return [found]
        scores, before = probe.scores.tolist(), self._directions
        ranked = sorted(layers.modules, key=lambda layer: (-scores[layer], layer not in before))
        largest = ranked[: self._config.num_active_layers]
        self._directions = {layer: probe.directions[layer] for layer in sorted(largest)}
        return [found, {"event": "draw", "layers": list(self._directions)}]

    def _perturbed(self, host: Host, batch: Batch) -> StepReport:
        config, layers, chosen = self._config, self._layers, list(self._directions)
        with host.frozen(layers.at_rest(chosen)):
            return perturbed_step(
                host,
                batch,
                {layer: layers.modules[layer] for layer in chosen},
                rho=config.rho,
                rho_scope=config.rho_scope,
                rho_scale=config.rho_scale,
                weights=layers.trainable,
                below=layers.below(chosen),
                choose=self._without_harm,
            )

    def _without_harm(self, gradients: Mapping[int, Tensor], worst: Worst) -> dict[int, Tensor]:
        """The eps_l of the module's docstring, from the g_l, [batch, sequence, hidden]."""
        if self._config.renormalise:
            return worst(self._orthogonal(gradients))
        return self._orthogonal(worst(gradients))

    def _orthogonal(self, states: Mapping[int, Tensor]) -> dict[int, Tensor]:
        return {layer: orthogonal_part(state, self._directions[layer]) for layer, state in states.items()}

    @classmethod
    def step_kinds(
        cls, config: OASISConfig, num_layers: int, *, accumulation: int, probes: Sequence[Sequence[float]] = ()
    ) -> list[StepKind]:
        """Choices by their lowest layer, above which everything runs twice, and the probe.

        Without `probes` all choices are taken for equally likely. The step of a probe counts as in T-Vaccine; where
        scores are not known, as for who counts, it leaves the layers as they are.
        """
        kinds = kinds_by_lowest_layer(config, num_layers, "top_k", probes=probes, state_of=cls.state_with)
        probed = 1 / (config.probe_steps * accumulation)
        return with_probe(kinds, StepKind(probed, config, Position(0, starts_step=True), kinds[0].state))

    @classmethod
    def state_with(cls, layers: Sequence[int]) -> dict[str, Any]:
        """The state in which `layers` stay chosen until a probe, and no direction is left out, at the same cost."""
        return {"num_probes": 1, "active_layers": list(layers), "directions": torch.zeros(len(layers), 1)}

    def state_dict(self) -> dict[str, Any]:
        """Number of probes, chosen layers, and their directions, [layers, hidden]."""
        directions = list(self._directions.values())
        return {
            "num_probes": self._num_probes,
            "active_layers": list(self._directions),
            "directions": torch.stack(directions) if directions else torch.zeros(0, 1),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._num_probes = state["num_probes"]
        device = self._layers.trainable[0].device
        self._directions = dict(zip(state["active_layers"], state["directions"].to(device), strict=True))


def orthogonal_part(states: Tensor, direction: Tensor) -> Tensor:
    """What of `states`, [batch, sequence, hidden], is orthogonal to `direction`, [hidden] with length 1 or 0.

    Exactly zero where a token's state lies along the direction, up to the rounding of its own numbers and of the sum.
    """
    x = precise(states)
    m = direction.to(x)
    rest = x - (x * m).sum(dim=-1, keepdim=True) * m
    rounding = torch.finfo(states.dtype).eps + _SUMMED * torch.finfo(x.dtype).eps
    is_meant = rest.norm(dim=-1, keepdim=True) > rounding * x.norm(dim=-1, keepdim=True)
    return torch.where(is_meant, rest, 0.0).to(states.dtype)


def _undefended(host: Host, batch: Batch) -> StepReport:
    """A plain step, which counts as one in which the defense did nothing."""
    loss = host.train(batch)
    return StepReport(loss=loss, norms={"perturbation_norm": torch.zeros_like(loss)})
