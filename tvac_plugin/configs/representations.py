"""Settings of the defenses that compare hidden states with the adapter and without it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Self

from pydantic import Field, model_validator

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.configs.base import DATA_KEYS, DefenseConfig, NumRows, Scale, Stream, example_entry

Layers = Annotated[list[Annotated[int, Field(ge=1, le=10_000)]], Field(min_length=1)]
Depths = Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)]
_BATCH = "on each process, once per optimizer step whatever the accumulation."
_LAYERS = "by number, 1 for the one next to the embeddings, in place of `depths`. Default: absent."


class RepresentationConfig(DefenseConfig):
    """What the settings with `layers` and `depths` share."""

    needs_adapter = True

    layers: Layers | None
    depths: Depths
    batch_size: NumRows

    @model_validator(mode="after")
    def _refuse_layers_said_twice(self) -> Self:
        if self.layers is not None and "depths" in self.model_fields_set:
            raise UserError(f"{self.block}.layers: names the layers, and `depths` does too. Remove one of them.")
        return self

    def layers_of(self, num_layers: int) -> list[int]:
        """The chosen layers of a decoder of `num_layers`, lowest first, counted from 1."""
        if self.layers is not None:
            return sorted(set(self.layers))
        return sorted({max(1, int(depth * num_layers + 0.5)) for depth in self.depths})

    def model_problems(self, num_layers: int) -> list[str]:
        """There must be a layer of each number."""
        above = [layer for layer in self.layers or [] if layer > num_layers]
        if not above:
            return []
        return [
            f"{self.block}.layers: {above[0]} is more than the model's {num_layers} layers. Use numbers up to "
            f"{num_layers}, or `depths`."
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

    alpha: Scale = Field(
        default=10.0,
        description="Weight of both terms: rerouting starts with all of it and ends with half, retaining starts with "
        "none and ends with half (paper: alpha). Default 10, as in the paper for Llama-3-8B.",
    )
    layers: Layers | None = Field(default=None, description=f"Layers whose harmful states are rerouted, {_LAYERS}")
    depths: Depths = Field(
        default=[0.3125, 0.625],
        description="Depths at which harmful states are rerouted, each as a share of the model's layers. Default "
        "[0.3125, 0.625], layers 10 and 20 of 32, as in the paper for Llama-3-8B.",
    )
    batch_size: NumRows = Field(
        default=16, description=f"Harmful rows, and retain rows, {_BATCH} Default 16, from the published script."
    )
