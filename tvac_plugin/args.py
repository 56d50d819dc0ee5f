"""The YAML surface: every key a recipe may set, with its bounds, its default and where the default comes from."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tvac_plugin.compat import conflicts

SafetyDefense = Literal["none", "t_vaccine", "vaccine"]
LayerSampling = Literal["gradient_norm", "top_k", "uniform"]
Freeze = Literal["layer", "attention", "none"]
Site = Literal["attention", "mlp", "layer"]
RhoScope = Literal["batch", "sample"]

_Steps = Annotated[int, Field(ge=1, le=10_000_000)]
_PERTURB = (
    "Whose output is pushed: `attention` (before the residual addition; published code), `mlp` or the whole `layer`. "
    "Default attention."
)
_RHO_SCOPE = (
    "What `rho` bounds: `batch`, the whole micro-batch tensor (published code: the budget of one sample shrinks as "
    "the batch grows), or `sample`, every sample alone. With packing a sample is one packed row. Default batch."
)


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Returns " Did you mean `x`?" for the option that `word` resembles, or the list of all options."""
    names = list(options)
    match = get_close_matches(word.lower().replace("-", "_"), names, n=1, cutoff=0.6)
    return f" Did you mean `{match[0]}`?" if match else f" Use one of: {', '.join(names)}."


class Block(BaseModel):
    """Base of the blocks that this plugin adds to a recipe; unknown keys and loose types are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    block: ClassVar[str]
    """The key of the block, or what to call it in an error."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for key in values:
                if key not in cls.model_fields:
                    raise ValueError(f"{cls.block}: unknown key `{key}`.{did_you_mean(str(key), cls.model_fields)}")
        return values


class DefenseConfig(Block):
    """Base of the blocks that hold one defense's settings; the block's key is a value of `safety_defense:`."""

    needs_harmful_data: ClassVar[bool]
    """Whether `harmful_datasets:` must be given."""

    @property
    def name(self) -> str:
        """The value of `safety_defense:` that selects this defense."""
        return self.block

    @property
    def num_harmful_rows(self) -> int | None:
        """How many rows of `harmful_datasets` are used, the first ones; `None` for all."""
        return None

    @property
    def harmful_batch_size(self) -> int:
        """Harmful rows in one batch, on each process."""
        return 1


class TVaccineConfig(DefenseConfig):
    """Settings of T-Vaccine (arXiv 2410.09760)."""

    block = "t_vaccine"
    needs_harmful_data = True

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
    resample_steps: _Steps = Field(
        default=20,
        description="Optimizer steps between draws (J). Default 20, from the published script; the paper's text "
        "draws every step: 1.",
    )
    probe_steps: _Steps = Field(
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
    perturb: Site = Field(default="attention", description=_PERTURB)
    rho_scope: RhoScope = Field(default="batch", description=_RHO_SCOPE)

    @property
    def num_harmful_rows(self) -> int:
        """The probe's pool."""
        return self.probe_samples

    @property
    def harmful_batch_size(self) -> int:
        """The probe's batch."""
        return self.probe_batch_size


class VaccineConfig(DefenseConfig):
    """Settings of Vaccine (arXiv 2402.01109)."""

    block = "vaccine"
    needs_harmful_data = False

    rho: float = Field(
        default=2.0,
        ge=0,
        le=10_000,
        description="Perturbation budget, L2 norm over all layers (paper: rho). Default 2, from the published script.",
    )
    perturb: Site = Field(default="attention", description=_PERTURB)
    rho_scope: RhoScope = Field(default="batch", description=_RHO_SCOPE)


DEFENSE_CONFIGS: dict[str, type[DefenseConfig]] = {config.block: config for config in (TVaccineConfig, VaccineConfig)}
"""Every defense by the value of `safety_defense:` that selects it."""

HARMFUL_DATASETS_EXAMPLE = "harmful_datasets: [{path: harmful.jsonl, type: alpaca}]"


Entries = Annotated[list[dict[str, Any]], Field(min_length=1)]


class SimulatedUserConfig(Block):
    """The data of a simulated user: a benign task with a share of harmful rows, as in the papers' attacks."""

    block = "simulated_user"

    num_samples: int = Field(
        default=1000,
        ge=1,
        le=10_000_000,
        description="Rows in all (papers: n). Default 1000, as in the papers.",
    )
    harmful_ratio: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Share of harmful rows (papers: p), exact: round(p * n) rows. Default 0.1, as in the papers.",
    )
    task_datasets: Entries | None = Field(
        default=None,
        description="The benign task; entries as in `datasets:`. Required unless `harmful_ratio` is 1. "
        "Default: absent.",
    )
    harmful_datasets: Entries | None = Field(
        default=None,
        description="Harmful prompts with harmful answers; entries as in `datasets:`. Required unless `harmful_ratio` "
        "is 0. Default: absent.",
    )
    seed: int = Field(default=42, ge=0, le=2**31 - 1, description="Of the rows drawn and of their order. Default 42.")
    disjoint_from: Entries | None = Field(
        default=None,
        description="Alignment, probe and evaluation data; entries as in `datasets:`. A prompt of the user's that is "
        "also there is an error. A chain fills this in. Default: absent.",
    )
    drop_overlap: bool = Field(
        default=False,
        description="Leave rows whose prompt is in `disjoint_from` out of the draw, and count them, instead of "
        "refusing them. Default False.",
    )

    @property
    def num_harmful(self) -> int:
        """Harmful rows, exactly."""
        return round(self.harmful_ratio * self.num_samples)

    @property
    def num_task(self) -> int:
        """Rows of the benign task."""
        return self.num_samples - self.num_harmful

    @model_validator(mode="after")
    def _refuse_missing_data(self) -> SimulatedUserConfig:
        for key, count, entries in (
            ("task_datasets", self.num_task, self.task_datasets),
            ("harmful_datasets", self.num_harmful, self.harmful_datasets),
        ):
            if count and not entries:
                raise ValueError(f"simulated_user: {count} rows are to come from `{key}:`, which is missing. Add it.")
        return self


class SafetyDefenseArgs(BaseModel):
    """The keys this plugin adds to an Axolotl recipe."""

    safety_defense: SafetyDefense | None = Field(
        default=None,
        description="The defense to train with: none, t_vaccine or vaccine. `none` trains undefended from the same "
        "adapter as a defended run; without the key the plugin does nothing. Default: absent.",
    )
    harmful_datasets: list[dict[str, Any]] | None = Field(
        default=None,
        min_length=1,
        description="Harmful prompts with harmful answers, for the probe; entries as in `datasets:`. Nothing is ever "
        "trained to give these answers. Required by t_vaccine.",
    )
    t_vaccine: TVaccineConfig | None = Field(default=None, description="Settings of `safety_defense: t_vaccine`.")
    vaccine: VaccineConfig | None = Field(default=None, description="Settings of `safety_defense: vaccine`.")
    simulated_user: SimulatedUserConfig | None = Field(
        default=None,
        description="Train on a simulated user's data instead of `datasets:`; makes the recipe an attack.",
    )

    @field_validator("safety_defense", mode="before")
    @classmethod
    def _refuse_unknown_defense(cls, value: Any) -> Any:
        known = get_args(SafetyDefense)
        if value is None or value in known:
            return value
        raise ValueError(f"safety_defense: `{value}` is not a defense.{did_you_mean(str(value), known)}")

    @model_validator(mode="after")
    def _refuse_what_cannot_work(self) -> SafetyDefenseArgs:
        problems = defense_problems(self.__dict__)
        if problems:
            raise ValueError("the safety defense cannot run with this recipe:\n- " + "\n- ".join(problems))
        return self


def defense_problems(recipe: dict[str, Any]) -> list[str]:
    """Lists why the defense that `recipe` asks for cannot run with it, one sentence each with the way out."""
    name = recipe.get("safety_defense")
    if name not in (None, "none") and recipe.get("simulated_user"):
        return [f"`simulated_user:` is an attack, and {name} defends alignment. Set `safety_defense: none`."]
    if name is None:
        ours = [key for key in ("harmful_datasets", *DEFENSE_CONFIGS) if recipe.get(key) is not None]
        return [
            f"`{key}:` is set but `safety_defense:` is not, so nothing would be defended. "
            f"Add `safety_defense: {key if key in DEFENSE_CONFIGS else 't_vaccine'}` or remove the block."
            for key in ours
        ]
    if name == "none":
        return []
    problems = conflicts(recipe)
    if DEFENSE_CONFIGS[name].needs_harmful_data and not recipe.get("harmful_datasets"):
        problems.append(f"{name} needs harmful data for its probe. Add `{HARMFUL_DATASETS_EXAMPLE}`.")
    return problems


def simulated_user_config(recipe: dict[str, Any]) -> SimulatedUserConfig | None:
    """Returns the attack of a validated recipe, `None` for none."""
    block = recipe.get("simulated_user")
    return None if block is None else SimulatedUserConfig.model_validate(_plain(block))


def _plain(value: Any) -> Any:
    """Copies Axolotl's nested dictionaries, which are a class of their own, to plain ones."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def defense_config(recipe: dict[str, Any]) -> DefenseConfig | None:
    """Returns the settings of the defense that a validated recipe selects, `None` for none."""
    name = recipe.get("safety_defense")
    if name in (None, "none"):
        return None
    return DEFENSE_CONFIGS[name].model_validate(_plain(recipe.get(name) or {}))
