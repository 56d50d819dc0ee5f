"""Random noise: the control that tells what a perturbation's direction is worth.

    every micro-batch    eps_l = rho / sqrt(L) * z_l / ||z_l||,  z_l from N(0, I), for each of the L layers
                         train on e_l + eps_l

The joint norm over the layers is rho, as Vaccine's (arXiv 2402.01109); only the direction is random. With `rho_scale:
relative` each eps_l is multiplied by the norm of the output that it is added to, so that rho is the joint norm of the
shares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tvac_plugin.configs.perturbation import RandomNoiseConfig
from tvac_plugin.defenses.base import Defense, Host, Position, StepReport
from tvac_plugin.defenses.budget import joint_share, output_square
from tvac_plugin.defenses.two_pass import refuse_unperturbed
from tvac_plugin.model.architecture import find_blocks
from tvac_plugin.model.hooks import perturb
from tvac_plugin.model.numerics import norm, seed_of
from tvac_plugin.model.types import Batch


class RandomNoise(Defense):
    """Trains everything, in one pass, with noise of a fixed norm on the outputs of all layers."""

    config_class = RandomNoiseConfig

    def __init__(self, config: RandomNoiseConfig, model: nn.Module, *, seed: int) -> None:
        """Binds the defense to `model`; the noise depends on `seed`, the layer and the micro-batch, on each process."""
        self._config = config
        self._modules = {block.index: block.module(config.perturb) for block in find_blocks(model)}
        self._seed = seed
        self._num_batches = 0

    def step(self, host: Host, batch: Batch, position: Position) -> StepReport:
        """One micro-batch in one pass."""
        added: dict[int, Tensor] = {}
        squares: dict[int, Tensor] = {}
        number, config = host.number(self._num_batches), self._config
        square_of = output_square(batch, config.rho_scope) if config.rho_scale == "relative" else None

        def noise(layer: int) -> Callable[[Tensor], Tensor]:
            def draw(hidden: Tensor) -> Tensor:
                added[layer] = self._noise(layer, number, hidden)
                if square_of is not None:
                    squares[layer] = square_of(hidden)
                    added[layer] = added[layer] * squares[layer].sqrt()
                return added[layer]

            return draw

        with perturb(self._modules, {layer: noise(layer) for layer in self._modules}) as fired:
            loss = host.train(batch)
        refuse_unperturbed(self._modules, fired)
        self._num_batches += 1
        norms = {"perturbation_norm": norm(list(added.values()))}
        if squares:
            norms["relative_perturbation_norm"] = joint_share(added, squares, config.rho_scope)
        return StepReport(
            loss=loss,
            losses={"perturbed_loss": loss},
            norms={name: fired.norm(length.to(loss.device)) for name, length in norms.items()},
            active_layers=tuple(sorted(self._modules)),
            num_fired=len(fired.changed),
        )

    def _noise(self, layer: int, number: int, hidden: Tensor) -> Tensor:
        """The noise of micro-batch `number` for an output of `layer`, [batch, sequence, hidden], before any scaling."""
        generator = torch.Generator(hidden.device).manual_seed(seed_of(self._seed, number, layer))
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        z = torch.randn(hidden.shape, generator=generator, device=hidden.device, dtype=dtype)
        dims = (1, 2) if self._config.rho_scope == "sample" else (0, 1, 2)
        length = self._config.rho / len(self._modules) ** 0.5
        noise: Tensor = length * z / z.square().sum(dims, keepdim=True).sqrt()
        return noise

    def state_dict(self) -> dict[str, Any]:
        """Number of micro-batches so far."""
        return {"num_batches": self._num_batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._num_batches = state["num_batches"]
