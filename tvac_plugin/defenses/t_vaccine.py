"""T-Vaccine (Liu et al., arXiv 2410.09760): only safety-critical layers are perturbed and trained.

    every K steps (probe)    s_l = ||dL(w; B_h) / de_l||,  p_l = s_l / sum over j of s_j
    every J steps (draw)     S = gamma different layers, drawn with probabilities p
    every step               g_l = dL(w; B) / de_l for l in S
                             eps_l = rho * g_l / sqrt(sum over j in S of ||g_j||^2)
                             train w_S on e_l + eps_l for l in S

e_l is the attention output of layer l, B a micro-batch of alignment data, B_h one of harmful data. Settings and their
symbols are described in `tvac_plugin.configs.perturbation.TVaccineConfig`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tvac_plugin.activations import find_blocks, frozen, has_side_outputs
from tvac_plugin.checkpointing import can_checkpoint, checkpointed
from tvac_plugin.configs.perturbation import TVaccineConfig
from tvac_plugin.defenses.base import Batch, Defense, Host, Position, StepReport, trainable
from tvac_plugin.defenses.two_pass import gradients_at, joint_norm, perturbed_step


class TVaccine(Defense):
    """Targeted Vaccine: probe, draw, perturb, train."""

    config_class = TVaccineConfig

    def __init__(self, config: TVaccineConfig, model: nn.Module, *, seed: int) -> None:
        """Binds the defense to `model`; what is drawn depends on `seed`, the scores and the step alone.

        Raises:
            ValueError: The model has fewer layers than are to be drawn, or its layers are not found.
        """
        self._blocks = find_blocks(model)
        if config.num_active_layers > len(self._blocks):
            raise ValueError(
                f"t_vaccine.num_active_layers: {config.num_active_layers} is more than the model's "
                f"{len(self._blocks)} layers. Set it to {len(self._blocks)} or less."
            )
        if config.checkpoint_inactive != "auto" and not all(can_checkpoint(block.layer) for block in self._blocks):
            raise ValueError(
                f"t_vaccine.checkpoint_inactive: the layers of {type(model).__name__} have no switch of their own. "
                "Set it to auto."
            )
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
        sum over r of (n_r * s_l,r)^2.
        """
        batch = host.batch("probe", self._num_probes)
        with host.auxiliary(), frozen(self._trainable), checkpointed(self._checkpointing(())):
            probe = gradients_at(self._modules, lambda: host.mean_loss(batch))
        norms = torch.stack([joint_norm({index: probe.at[index]}) for index in sorted(self._modules)])
        num_tokens = (batch["labels"][:, 1:] != -100).sum().to(norms.device, norms.dtype)
        totals = torch.stack([num_tokens, num_tokens * probe.loss, *(num_tokens * norms).square()])
        mean_tokens, mean_loss, *squares = host.mean_across_processes(totals).cpu().double()
        scores = torch.stack(squares).sqrt() / mean_tokens
        self._num_probes += 1
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
            probabilities = _uniform(len(self._blocks))
        if self._config.layer_sampling == "top_k":
            drawn = probabilities.topk(count).indices
        else:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step)
            drawn = torch.multinomial(probabilities, count, replacement=False, generator=generator)
        self._active = tuple(sorted(drawn.tolist()))
        return {"event": "draw", "layers": list(self._active)}

    def _at_rest(self) -> list[nn.Parameter]:
        """Parameters that do not learn while S is drawn, as `freeze` defines it."""
        if self._config.freeze == "none":
            return []
        if self._config.freeze == "layer":
            learning = _parameter_ids(self._blocks[index].layer for index in self._active)
            return [p for p in self._trainable if id(p) not in learning]
        below = self._blocks[: min(self._active)]
        undrawn = [block for block in self._blocks if block.index not in self._active]
        resting = _parameter_ids([*(b.layer for b in below), *(b.attention for b in undrawn)])
        return [p for p in self._trainable if id(p) in resting]

    def _below(self) -> list[nn.Module]:
        """The layers below the lowest drawn one, if nothing learns there and they hand on nothing but their output."""
        learns = {"layer": False, "attention": self._trains_embeddings, "none": True}[self._config.freeze]
        if learns or self._has_side_outputs:
            return []
        return [block.layer for block in self._blocks[: min(self._active)]]

    def _checkpointing(self, drawn: tuple[int, ...]) -> dict[nn.Module, bool]:
        """Which layers keep only their input in a pass, as `checkpoint_inactive` says; empty to leave them alone."""
        setting = self._config.checkpoint_inactive
        if setting == "auto":
            return {}
        layers = self._blocks if setting == "on" else [block for block in self._blocks if block.index not in drawn]
        return {block.layer: setting == "on" and block.index not in drawn for block in layers}

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


def layer_probabilities(scores: Tensor) -> Tensor:
    """Scores s_l, [layers], to probabilities p_l = s_l / sum over j of s_j; uniform where they say nothing."""
    total = scores.sum()
    if not torch.isfinite(total) or total <= 0:
        return _uniform(len(scores))
    return (scores / total).clamp(min=1e-12)


def entropy(probabilities: Tensor) -> float:
    """Entropy in nats: log(layers) when all layers matter alike, 0 when one is all that matters."""
    return float(-(probabilities * probabilities.log()).sum())


def _uniform(count: int) -> Tensor:
    return torch.full((count,), 1 / count, dtype=torch.float64)


def _parameter_ids(modules: Iterable[nn.Module]) -> set[int]:
    return {id(parameter) for module in modules for parameter in module.parameters()}
