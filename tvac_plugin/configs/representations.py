"""Settings of the defenses that compare hidden states with the adapter and without it."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Mapping
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.configs.base import DATA_KEYS, DefenseConfig, NumRows, Scale, Stream, example_entry

Layers = Annotated[list[Annotated[int, Field(ge=1, le=10_000)]], Field(min_length=1)]
Depth = Annotated[float, Field(gt=0, le=1)]
Margin = Annotated[float, Field(ge=0, le=2)]
_BATCH = "on each process, once per optimizer step whatever the accumulation."
_LAYERS = "by number, 1 for the one next to the embeddings, in place of `depths`. Default None."


class RepresentationConfig(DefenseConfig):
    """What the settings share that name layers by number, or else by depth."""

    needs_adapter = True
    relative: ClassVar[str]
    """The setting that says how deep the layers are."""

    layers: Layers | None
    batch_size: NumRows

    @model_validator(mode="after")
    def _refuse_layers_said_twice(self) -> Self:
        if self.layers is not None and self.relative in self.model_fields_set:
            raise UserError(
                f"{self.block}.layers: names the layers, and `{self.relative}` does too. Remove one of them."
            )
        return self

    def layers_of(self, num_layers: int) -> list[int]:
        """The chosen layers of a decoder of `num_layers`, lowest first, counted from 1."""
        return sorted(set(self.layers)) if self.layers is not None else self.relative_layers(num_layers)

    @abstractmethod
    def relative_layers(self, num_layers: int) -> list[int]:
        """The layers that are as deep as the settings say, lowest first."""

    def model_problems(self, num_layers: int) -> list[str]:
        """There must be a layer of each number."""
        above = [layer for layer in self.layers or [] if layer > num_layers]
        if not above:
            return []
        return [
            f"{self.block}.layers: {above[0]} is more than the model's {num_layers} layers. Use numbers up to "
            f"{num_layers}, or `{self.relative}`."
        ]

    def streams(self) -> Mapping[str, Stream]:
        """Harmful answers to move, and optional benign rows to keep."""
        return {
            "harmful": Stream("harmful_datasets", self.batch_size),
            "benign": Stream("retain_datasets", self.batch_size, optional=True),
        }

    def advice(self, keys: Collection[str]) -> list[str]:
        """Without retain data the states to keep are those on the alignment data, whose refusals are to be learnt."""
        if "retain_datasets" in keys:
            return []
        return [
            f"{self.block} has no `retain_datasets:`. It then holds hidden states on `datasets:` to those of the model "
            "without its adapter, so a model that does not refuse yet is held to answering. Start from a merged "
            f"aligned model, or add {DATA_KEYS['retain_datasets']}: `{example_entry('retain_datasets')}`."
        ]


class CircuitBreakerConfig(RepresentationConfig):
    """Settings of circuit breakers by representation rerouting (arXiv 2406.04313)."""

    block = "circuit_breaker"
    strengths = ("alpha",)
    relative = "depths"

    alpha: Scale = Field(
        default=10.0,
        description="Weight of both terms: rerouting starts with all of it and ends with half, retaining starts with "
        "none and ends with half (paper: alpha). The paper trains nothing else; here it is the weight against the "
        "cross-entropy on `datasets:`. Default 10, as in the paper for Llama-3-8B.",
    )
    retain_scale: Scale = Field(
        default=1.0,
        description="Further weight of retaining alone: with less of it, harmful states go farther, "
        "and benign ones too. Default 1, as in the paper.",
    )
    layers: Layers | None = Field(default=None, description=f"Layers whose harmful states are rerouted, {_LAYERS}")
    depths: Annotated[list[Depth], Field(min_length=1)] = Field(
        default=[0.3125, 0.625],
        description="Depths at which harmful states are rerouted, each as a share of the model's layers. Default "
        "[0.3125, 0.625], layers 10 and 20 of 32, as in the paper for Llama-3-8B.",
    )
    batch_size: NumRows = Field(
        default=16, description=f"Harmful rows, and retain rows, {_BATCH} Default 16, from the published script."
    )

    def relative_layers(self, num_layers: int) -> list[int]:
        """The layer nearest to each depth."""
        return sorted({max(1, math.floor(depth * num_layers + 0.5)) for depth in self.depths})


class CRLConfig(RepresentationConfig):
    """Settings of CRL, contrastive representation learning with triplets (arXiv 2506.11938)."""

    block = "crl"
    strengths = ("harmful_scale",)
    relative = "depth_range"

    harmful_scale: Scale = Field(
        default=0.4,
        description="Weight of the triplet that pulls harmful states together, away from where they were (paper: "
        "beta). Default 0.4, as in the paper.",
    )
    benign_scale: Scale = Field(
        default=0.5,
        description="Weight of the triplet that holds benign states where they were, away from harmful ones (paper: "
        "alpha). Default 0.5, as in the paper.",
    )
    kl_scale: Scale = Field(
        default=0.9,
        description="Weight of the divergence from the predictions without the adapter, on benign rows (paper: "
        "gamma). Default 0.9, as in the paper.",
    )
    harmful_margin: Margin = Field(
        default=0.5,
        description="By how much farther a harmful state must be from where it was than from the others' mean, in "
        "cosine distance. Default 0.5, from TamperBench; the paper's are for lengths.",
    )
    benign_margin: Margin = Field(
        default=0.3,
        description="By how much nearer a benign state must be to where it was than to the harmful mean. Default 0.3, "
        "from TamperBench; the paper's are for lengths.",
    )
    kl_temperature: float = Field(
        default=2.0, ge=0.1, le=100, description="Temperature of the divergence. Default 2, from the published code."
    )
    layers: Layers | None = Field(
        default=None, description=f"Layers whose states are compared, {_LAYERS.replace('depths', 'depth_range')}"
    )
    depth_range: tuple[Depth, Depth] = Field(
        default=(0.625, 0.96875),
        strict=False,
        description="The layers between these depths are compared, each depth a share of the model's layers. Default "
        "(0.625, 0.96875), layers 20 to 31 of 32.",
    )
    batch_size: NumRows = Field(
        default=16, description=f"Harmful rows, and retain rows, {_BATCH} Default 16, from the published script."
    )

    @model_validator(mode="after")
    def _refuse_a_range_that_ends_before_it_starts(self) -> Self:
        if self.depth_range[0] > self.depth_range[1]:
            raise UserError("crl.depth_range: ends before it starts. Write the lower depth first.")
        return self

    def relative_layers(self, num_layers: int) -> list[int]:
        """All layers in the range, at least one."""
        first, last = (depth * num_layers for depth in self.depth_range)
        lowest = math.ceil(first)
        return list(range(lowest, max(lowest, math.floor(last)) + 1))
