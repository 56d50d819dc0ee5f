"""Settings of the defenses that perturb hidden states: T-Vaccine, OASIS, Vaccine and their control."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.configs.base import (
    PERTURB,
    PERTURBED_SHARE,
    RHO_SCALE,
    RHO_SCOPE,
    DefenseConfig,
    RhoScale,
    RhoScope,
    Share,
    Site,
    Steps,
    Stream,
)

LayerSampling = Literal["gradient_norm", "relative_gradient_norm", "top_k", "uniform"]
Freeze = Literal["layer", "attention", "none"]
CheckpointInactive = Literal["auto", "on", "off"]


class PerturbationConfig(DefenseConfig):
    """What the settings with a `rho` and a `rho_scale` share."""

    strengths = ("rho",)

    @model_validator(mode="after")
    def _refuse_a_norm_as_a_share(self) -> Self:
        """The default of `rho` is a norm, and hundreds of percent as a share."""
        if getattr(self, "rho_scale", None) == "relative" and "rho" not in self.model_fields_set:
            raise UserError(
                f"{self.block}.rho: has no default with `rho_scale: relative`, where it is a share of the norm of what "
                f"is perturbed. Add it, for example `{self.block}: {{rho_scale: relative, rho: 0.1}}`."
            )
        return self


class TVaccineConfig(PerturbationConfig):
    """Settings of T-Vaccine (arXiv 2410.09760)."""

    block = "t_vaccine"
    draws_layers = True

    rho: float = Field(
        default=3.0,
        ge=0,
        le=10_000,
        description="Perturbation budget, L2 norm over all drawn layers (paper: rho). Default 3, best in the paper's "
        "Table 7.",
    )
    num_active_layers: int = Field(
        default=8,
        ge=1,
        le=10_000,
        description="Layers drawn, perturbed and trained at a time (paper: gamma, the size of S). Default 8, best in "
        "the paper's Table 4 for 32 layers; at most the model's number of layers.",
    )
    layer_sampling: LayerSampling = Field(
        default="gradient_norm",
        description="How layers are drawn: `gradient_norm`, without replacement with probabilities proportional to "
        "the probe's scores (paper); `relative_gradient_norm`, the same with each score multiplied by the norm of the "
        "layer's output, so that it does not depend on the output's scale; `top_k`, the highest of the paper's scores; "
        "`uniform`, no probe. Default gradient_norm.",
    )
    resample_steps: Steps = Field(
        default=20,
        description="Optimizer steps between draws (J). Default 20, from the published script; the paper's text "
        "draws every step: 1.",
    )
    probe_steps: Steps = Field(
        default=200, description="Optimizer steps between probes (paper: K). Default 200, best in the paper's Table 5."
    )
    probe_samples: int = Field(
        default=200,
        ge=1,
        le=10_000_000,
        description="Harmful examples available to the probe: the first rows of `harmful_datasets` (paper: N_h). "
        "Default 200, as in the paper.",
    )
    probe_batch_size: int = Field(
        default=8,
        ge=1,
        le=100_000,
        description="Harmful examples averaged in one probe, on each process. Default 8, for less noisy scores; the "
        "published code uses 1.",
    )
    freeze: Freeze = Field(
        default="layer",
        description="What is frozen: `layer`, everything outside the drawn layers (paper's text); `attention`, the "
        "attention weights of undrawn layers and all weights of layers below the lowest drawn one, whose next lower "
        "neighbour's other weights learn too in models of more than 26 layers (published code); `none`. Default layer.",
    )
    perturb: Site = Field(default="attention", description=PERTURB)
    rho_scope: RhoScope = Field(default="batch", description=RHO_SCOPE)
    rho_scale: RhoScale = Field(default="absolute", description=RHO_SCALE)
    perturbed_share: Share = Field(default=1.0, description=PERTURBED_SHARE)
    checkpoint_inactive: CheckpointInactive = Field(
        default="auto",
        description="Activation checkpointing: `auto`, as `gradient_checkpointing` says for all layers; `on`, undrawn "
        "layers only (published code, up to 26 layers), which saves most of the memory for less time; `off`, no "
        "undrawn layer. Default auto.",
    )

    @field_validator("checkpoint_inactive", mode="before")
    @classmethod
    def _read_yaml_switch(cls, value: Any) -> Any:
        """YAML reads a bare `on` or `off` as a boolean."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    def streams(self) -> Mapping[str, Stream]:
        """Harmful examples for the probe."""
        return {"probe": Stream("harmful_datasets", self.probe_batch_size, limit=self.probe_samples)}

    def model_problems(self, num_layers: int) -> list[str]:
        """More layers cannot be drawn than there are."""
        return _too_many_layers(self.block, self.num_active_layers, num_layers)

    def less_memory(self, *, checkpointed: bool) -> dict[str, Any]:
        """Checkpointing of undrawn layers, unless all layers are checkpointed."""
        cheapest = "auto" if checkpointed else "on"
        return {} if self.checkpoint_inactive == cheapest else {"checkpoint_inactive": cheapest}

    @classmethod
    def for_benchmark(cls, *, rows: int, layers: int) -> dict[str, Any]:
        """Uniform draws at every step, so that the mean over steps is the mean over draws."""
        return {
            "num_active_layers": layers, "layer_sampling": "uniform", "resample_steps": 1, "probe_batch_size": rows,
        }  # fmt: skip


class OASISConfig(PerturbationConfig):
    """Settings of OASIS (ACL 2026, long paper 1310)."""

    block = "oasis"
    draws_layers = True

    rho: float = Field(
        default=3.0,
        ge=0,
        le=10_000,
        description="Perturbation budget before the harmful direction is removed, L2 norm over all chosen layers "
        "(published code: rho). Default 3, from the published script.",
    )
    num_active_layers: int = Field(
        default=20,
        ge=1,
        le=10_000,
        description="Layers perturbed and trained: those with the largest gradient on harmful data (published code: "
        "top_k_layers). Default 20, from the published script, for 32 layers; at most the model's number of layers.",
    )
    probe_steps: Steps = Field(
        default=100,
        description="Optimizer steps between probes, which choose the layers and the harmful directions (published "
        "code: update_freq). Default 100, from the published code.",
    )
    probe_samples: int = Field(
        default=100,
        ge=1,
        le=10_000_000,
        description="Harmful examples available to the probe: the first rows of `harmful_datasets` (published code: "
        "prompt_data_size). Default 100, from the published code.",
    )
    probe_batch_size: int = Field(
        default=8,
        ge=1,
        le=100_000,
        description="Harmful examples averaged in one probe, on each process. Default 8, for less noisy layers and "
        "directions; the published code uses 1.",
    )
    renormalise: bool = Field(
        default=False,
        description="Whether what is left without the harmful direction is scaled to `rho` again, which makes it the "
        "worst perturbation within the budget among those that leave this direction out. Default False: as in the "
        "published code, its norm is then below `rho`.",
    )
    perturb: Site = Field(default="attention", description=PERTURB)
    rho_scope: RhoScope = Field(default="batch", description=RHO_SCOPE)
    rho_scale: RhoScale = Field(default="absolute", description=RHO_SCALE)

    def streams(self) -> Mapping[str, Stream]:
        """Harmful examples for the probe."""
        return {"probe": Stream("harmful_datasets", self.probe_batch_size, limit=self.probe_samples)}

    def model_problems(self, num_layers: int) -> list[str]:
        """More layers cannot be chosen than there are."""
        return _too_many_layers(self.block, self.num_active_layers, num_layers)

    @classmethod
    def for_benchmark(cls, *, rows: int, layers: int) -> dict[str, Any]:
        """No probe among the steps that are measured, each of which is given its layers."""
        return {"num_active_layers": layers, "probe_steps": 10_000_000, "probe_batch_size": rows}


def _too_many_layers(block: str, num_active: int, num_layers: int) -> list[str]:
    if num_active <= num_layers:
        return []
    return [
        f"{block}.num_active_layers: {num_active} is more than the model's {num_layers} layers. "
        f"Set it to {num_layers} or less."
    ]


class VaccineConfig(PerturbationConfig):
    """Settings of Vaccine (arXiv 2402.01109)."""

    block = "vaccine"

    rho: float = Field(
        default=2.0,
        ge=0,
        le=10_000,
        description="Perturbation budget, L2 norm over all layers (paper: rho). Default 2, from the published script.",
    )
    perturb: Site = Field(default="attention", description=PERTURB)
    rho_scope: RhoScope = Field(default="batch", description=RHO_SCOPE)
    rho_scale: RhoScale = Field(default="absolute", description=RHO_SCALE)
    perturbed_share: Share = Field(default=1.0, description=PERTURBED_SHARE)


class RandomNoiseConfig(PerturbationConfig):
    """Settings of the control for every perturbation: Gaussian noise of the same norm in a random direction."""

    block = "random_noise"

    rho: float = Field(
        default=2.0,
        ge=0,
        le=10_000,
        description="L2 norm of the noise over all layers, so that Vaccine with the same `rho` differs only in the "
        "direction. Default 2, as Vaccine's.",
    )
    perturb: Site = Field(default="attention", description=PERTURB)
    rho_scope: RhoScope = Field(default="batch", description=RHO_SCOPE)
    rho_scale: RhoScale = Field(default="absolute", description=RHO_SCALE)
