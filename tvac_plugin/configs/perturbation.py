"""Settings of the defenses that perturb hidden states: T-Vaccine, Vaccine and their control."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator

from tvac_plugin.configs.base import (
    PERTURB,
    PERTURBED_SHARE,
    RHO_SCOPE,
    DefenseConfig,
    RhoScope,
    Share,
    Site,
    Steps,
    Stream,
)

LayerSampling = Literal["gradient_norm", "top_k", "uniform"]
Freeze = Literal["layer", "attention", "none"]
CheckpointInactive = Literal["auto", "on", "off"]


class TVaccineConfig(DefenseConfig):
    """Settings of T-Vaccine (arXiv 2410.09760)."""

    block = "t_vaccine"

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
        "the probe's scores (paper); `top_k`, the highest scores; `uniform`, no probe. Default gradient_norm.",
    )
    resample_steps: Steps = Field(
        default=20,
        description="Optimizer steps between draws (J). Default 20, from the published script; the paper's text "
        "draws every step: 1.",
    )
    probe_steps: Steps = Field(
        default=200,
        description="Optimizer steps between probes (paper: K). Default 200, best in the paper's Table 5.",
    )
    probe_samples: int = Field(
        default=200,
        ge=1,
        le=10_000_000,
        description="Harmful examples available to the probe, the first ones of `harmful_datasets` (paper: N_h). "
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
        description="What rests: `layer`, everything outside the drawn layers (paper's text); `attention`, attention "
        "weights of undrawn layers and all weights of layers below the lowest drawn one (published code); `none`. "
        "Default layer.",
    )
    perturb: Site = Field(default="attention", description=PERTURB)
    rho_scope: RhoScope = Field(default="batch", description=RHO_SCOPE)
    perturbed_share: Share = Field(default=1.0, description=PERTURBED_SHARE)
    checkpoint_inactive: CheckpointInactive = Field(
        default="auto",
        description="Activation checkpointing of undrawn layers: `auto`, as `gradient_checkpointing` says for all "
        "layers; `on`, of undrawn layers and no others (published code), which saves most of the memory for less time; "
        "`off`, of no undrawn layer. Default auto.",
    )

    @field_validator("checkpoint_inactive", mode="before")
    @classmethod
    def _read_yaml_switch(cls, value: Any) -> Any:
        """YAML reads a bare `on` or `off` as a boolean."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    def streams(self) -> Mapping[str, Stream]:
        """Harmful examples for the probe."""
        return {"probe": Stream("harmful_datasets", self.probe_batch_size, limit=self.probe_samples)}


class VaccineConfig(DefenseConfig):
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
    perturbed_share: Share = Field(default=1.0, description=PERTURBED_SHARE)


class RandomNoiseConfig(DefenseConfig):
    """Settings of the control for every perturbation: Gaussian noise of the same norm in a random direction."""

    block = "random_noise"

    rho: float = Field(
        default=2.0,
        ge=0,
        le=10_000,
        description="L2 norm of the noise over all layers, so that a Vaccine of the same `rho` differs in the "
        "direction alone. Default 2, as Vaccine's.",
    )
    perturb: Site = Field(default="attention", description=PERTURB)
    rho_scope: RhoScope = Field(default="batch", description=RHO_SCOPE)
