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

from collections.abc import Iterable, Mapping, Sequence
from logging import getLogger
from typing import Any

import torch
from torch import Tensor, nn

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.configs.perturbation import TVaccineConfig
from tvac_plugin.defenses.base import Defense, Host, Position, StepKind, StepReport, trainable
from tvac_plugin.defenses.budget import output_square
from tvac_plugin.defenses.layer_draws import draw_layers, entropy, layer_probabilities, lowest_layer_shares, uniform
from tvac_plugin.defenses.two_pass import gradients_at, perturbed_step
from tvac_plugin.model.architecture import find_blocks, has_side_outputs
from tvac_plugin.model.hooks import frozen
from tvac_plugin.model.layer_checkpointing import can_checkpoint, checkpointed
from tvac_plugin.model.numerics import norm, seed_of
from tvac_plugin.model.types import Batch

LOG = getLogger(__name__)
_NEVER = 10_000_000
_MANY_LAYERS = 26  # with more, the published code trains MLP adapters from one layer below the lowest drawn one


class TVaccine(Defense):
    """Targeted Vaccine: probe, draw, perturb, train."""

    config_class = TVaccineConfig

    def __init__(self, config: TVaccineConfig, model: nn.Module, *, seed: int) -> None:
        """Binds the defense to `model`; what is drawn depends on `seed`, the scores and the step alone.

        Raises:
            UserError: The model has fewer layers than are to be drawn, or its layers are not found.
        """
        self._blocks = find_blocks(model)
        for problem in config.model_problems(len(self._blocks)):
            raise UserError(problem)
        if config.checkpoint_inactive != "auto" and not all(can_checkpoint(block.layer) for block in self._blocks):
            raise UserError(
                f"t_vaccine.checkpoint_inactive: the layers of {type(model).__name__} have no switch of their own. "
                "Set it to auto."
            )
        self._refuse_untrainable(config)
        self._config = config
        self._modules = {block.index: block.module(config.perturb) for block in self._blocks}
        self._trainable = trainable(model)
        self._has_side_outputs = has_side_outputs(model)
        in_blocks = _parameter_ids(block.layer for block in self._blocks)
        self._trains_embeddings = any(id(parameter) not in in_blocks for parameter in self._trainable)
        self._seed = seed
        self._num_probes = 0
        self._probabilities: Tensor | None = None
        self._active: tuple[int, ...] = ()

    def _refuse_untrainable(self, config: TVaccineConfig) -> None:
        idle = [block.index for block in self._blocks if not trainable(block.layer)]
        if idle and config.freeze != "none":
            raise UserError(
                f"t_vaccine: nothing learns in layers {', '.join(map(str, idle))}, and with `freeze: {config.freeze}` "
                "only drawn layers learn. Train something in every layer, or set `t_vaccine.freeze: none`."
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
        with host.frozen(self._at_rest()), checkpointed(self._checkpointing(self._active)):
            report = perturbed_step(
                host,
                batch,
                {index: self._modules[index] for index in self._active},
                rho=config.rho,
                rho_scope=config.rho_scope,
                rho_scale=config.rho_scale,
                weights=self._trainable,
                below=self._below(),
                share=config.perturbed_share,
            )
        report.events = events
        return report

    def _probe_is_due(self, step: int) -> bool:
        if self._config.layer_sampling == "uniform":
            return False
        return self._probabilities is None or step % self._config.probe_steps == 0

    def _probe(self, host: Host) -> dict[str, Any]:
        """Scores each layer by the gradient norm of its output on harmful data (p_l = s_l / sum s_j).

        Processes that probe n_r answer tokens each score as one that probes them all: s_l^2 is proportional to the
        sum over r of (n_r * s_l,r)^2, and the squared norm of an output is the sum of theirs.
        """
        batch = host.batch("probe", self._num_probes)
        is_relative = self._config.layer_sampling == "relative_gradient_norm"
        square_of = output_square(batch, "batch") if is_relative else None
        with host.auxiliary(), frozen(self._trainable), checkpointed(self._checkpointing(())):
            probe = gradients_at(self._modules, host, lambda: host.mean_loss(batch), square_of=square_of)
        norms = torch.stack([norm([probe.at[index]]) for index in sorted(self._modules)])
        num_tokens = (batch["labels"][:, 1:] != -100).sum().to(norms.device, norms.dtype)
        outputs = [probe.squares[index].squeeze() for index in sorted(probe.squares)]
        totals = torch.stack([num_tokens, num_tokens * probe.loss, *(num_tokens * norms).square(), *outputs])
        mean_tokens, mean_loss, *squares = host.mean_across_processes(totals).cpu().double()
        scores = torch.stack(squares[: len(norms)]).sqrt() / mean_tokens
        if is_relative:
            scores = scores * torch.stack(squares[len(norms) :]).sqrt()
        self._num_probes += 1
        if not (torch.isfinite(scores).all() and scores.sum() > 0):
            LOG.warning(
                f"probe {self._num_probes}: its scores are zero or not finite, so layers are drawn uniformly until "
                "the next one. Look for harmful rows without an answer, or lower the learning rate."
            )
        self._probabilities = layer_probabilities(scores)
        return {
            "event": "probe",
            "harmful_loss": (mean_loss / mean_tokens).item(),
            "scores": scores.tolist(),
            "probabilities": self._probabilities.tolist(),
            "entropy": entropy(self._probabilities),
        }

    def _draw(self, step: int) -> dict[str, Any]:
        """Draws S, the layers that are perturbed and trained until the next draw, without replacement."""
        count = self._config.num_active_layers
        probabilities = self._probabilities
        if probabilities is None:
            probabilities = uniform(len(self._blocks))
        drawn = draw_layers(probabilities, count, self._config.layer_sampling, seed=seed_of(self._seed, step))
        self._active = tuple(sorted(drawn.tolist()))
        return {"event": "draw", "layers": list(self._active)}

    def _at_rest(self) -> list[nn.Parameter]:
        """Parameters that do not learn while S is drawn, as `freeze` defines it."""
        if self._config.freeze == "none":
            return []
        if self._config.freeze == "layer":
            learning = _parameter_ids(self._blocks[index].layer for index in self._active)
            return [p for p in self._trainable if id(p) not in learning]
        below = self._blocks[: self._lowest_learning()]
        undrawn = [block for block in self._blocks if block.index not in self._active]
        resting = _parameter_ids([*(b.layer for b in below), *(b.attention for b in undrawn)])
        return [p for p in self._trainable if id(p) in resting]

    def _lowest_learning(self) -> int:
        """The lowest layer in which something learns, where anything is frozen.

        In the published code nothing learns below the lowest layer that it does not checkpoint. That is the lowest
        drawn one, and with more than 26 layers the one before.
        """
        reaches_lower = self._config.freeze == "attention" and len(self._blocks) > _MANY_LAYERS
        return max(0, min(self._active) - reaches_lower)

    def _below(self) -> list[nn.Module]:
        """The layers below the lowest that learns, if there is one and they hand on nothing but their output."""
        learns = {"layer": False, "attention": self._trains_embeddings, "none": True}[self._config.freeze]
        if learns or self._has_side_outputs:
            return []
        return [block.layer for block in self._blocks[: self._lowest_learning()]]

    def _checkpointing(self, drawn: tuple[int, ...]) -> dict[nn.Module, bool]:
        """Which layers keep only their input in a pass, as `checkpoint_inactive` says; empty to leave them alone."""
        setting = self._config.checkpoint_inactive
        if setting == "auto":
            return {}
        layers = self._blocks if setting == "on" else [block for block in self._blocks if block.index not in drawn]
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
        num_drawn, kinds = config.num_active_layers, []
        shares = lowest_layer_shares(num_layers, num_drawn, config.layer_sampling, probes=probes)
        for lowest, share in shares.items():
            gaps = range(num_drawn - 1)
            above = [lowest + 1 + i * (num_layers - 1 - lowest) // (num_drawn - 1) for i in gaps]
            state = {"num_probes": 1, "probabilities": None, "active_layers": [lowest, *above]}
            kinds.append(StepKind(share, config, Position(1, starts_step=False), state, place=lowest))
        if config.layer_sampling == "uniform":
            return kinds
        costliest, probed = kinds[0], 1 / (config.probe_steps * accumulation)
        undrawn = config.model_copy(update={"resample_steps": _NEVER})
        kinds[0] = costliest._replace(share=costliest.share - probed)
        return [*kinds, StepKind(probed, undrawn, Position(1, starts_step=True), costliest.state)]

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


def _parameter_ids(modules: Iterable[nn.Module]) -> set[int]:
    return {id(parameter) for module in modules for parameter in module.parameters()}
