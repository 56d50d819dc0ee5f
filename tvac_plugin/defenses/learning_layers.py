"""A decoder of which only some layers learn at a time: what rests, and what both passes of a step may share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.configs.base import Site
from tvac_plugin.configs.perturbation import Freeze, PerturbationConfig
from tvac_plugin.defenses.base import trainable
from tvac_plugin.model.architecture import find_blocks, has_side_outputs

_MANY_LAYERS = 26  # with more, T-Vaccine's published code trains MLP adapters from one layer below the lowest drawn one


class LearningLayers:
    """The layers of a model, and what learns while some of them, S, are drawn.

    Attributes:
        blocks: All layers, in order.
        modules: Layer index to the module whose output is perturbed.
        trainable: All parameters that learn at some time.
    """

    def __init__(self, model: nn.Module, config: PerturbationConfig, site: Site, *, freeze: Freeze = "layer") -> None:
        """Finds the layers.

        Args:
            model: The model without the trainer's wrappers.
            config: Of the defense; says whether the model has enough layers.
            site: Whose output is perturbed.
            freeze: What rests: "layer", all outside S; "attention", as the published code of T-Vaccine does; "none".

        Raises:
            UserError: The layers are not found, or do not fit `config`.
        """
        self.blocks = find_blocks(model)
        for problem in config.model_problems(len(self.blocks)):
            raise UserError(problem)
        self._freeze = freeze
        self.modules = {block.index: block.module(site) for block in self.blocks}
        self.trainable = trainable(model)
        self._has_side_outputs = has_side_outputs(model)
        in_blocks = _parameter_ids(block.layer for block in self.blocks)
        self._trains_embeddings = any(id(parameter) not in in_blocks for parameter in self.trainable)

    def untrainable(self) -> str:
        """Indices of the layers in which nothing could learn, with commas; empty where there are none."""
        return ", ".join(str(block.index) for block in self.blocks if not trainable(block.layer))

    def at_rest(self, drawn: Sequence[int]) -> list[nn.Parameter]:
        """Parameters that do not learn while S is drawn, as `freeze` defines it."""
        if self._freeze == "none":
            return []
        if self._freeze == "layer":
            learning = _parameter_ids(self.blocks[index].layer for index in drawn)
            return [p for p in self.trainable if id(p) not in learning]
        below = self.blocks[: self._lowest_learning(drawn)]
        undrawn = [block for block in self.blocks if block.index not in drawn]
        resting = _parameter_ids([*(b.layer for b in below), *(b.attention for b in undrawn)])
        return [p for p in self.trainable if id(p) in resting]

    def below(self, drawn: Sequence[int]) -> list[nn.Module]:
        """The layers below the lowest that learns, if there is one and they hand on nothing but their output."""
        learns = {"layer": False, "attention": self._trains_embeddings, "none": True}[self._freeze]
        if learns or self._has_side_outputs:
            return []
        return [block.layer for block in self.blocks[: self._lowest_learning(drawn)]]

    def _lowest_learning(self, drawn: Sequence[int]) -> int:
        """The lowest layer in which something learns, where anything is frozen.

        In the published code of T-Vaccine nothing learns below the lowest layer that it does not checkpoint. That is
        the lowest drawn one, and with more than 26 layers the one before.
        """
        reaches_lower = self._freeze == "attention" and len(self.blocks) > _MANY_LAYERS
        return max(0, min(drawn) - reaches_lower)


def _parameter_ids(modules: Iterable[nn.Module]) -> set[int]:
    return {id(parameter) for module in modules for parameter in module.parameters()}
