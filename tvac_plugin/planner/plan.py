"""A recipe's cost and whether it fits: for its defense, for supervised fine-tuning and for Vaccine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tvac_plugin.args import defense_config
from tvac_plugin.boundary.errors import UserError
from tvac_plugin.configs.base import DATA_KEYS, DefenseConfig
from tvac_plugin.configs.perturbation import VaccineConfig
from tvac_plugin.planner.draws import draws_problem, read_probes
from tvac_plugin.planner.fake_model import build_fake_model
from tvac_plugin.planner.ledger import Cost, Kind
from tvac_plugin.planner.mean_cost import Probes, heaviest_cost, mean_cost
from tvac_plugin.planner.model_config import load_model_config
from tvac_plugin.planner.remedies import remedies
from tvac_plugin.planner.step import StepCounter
from tvac_plugin.planner.workload import read_workload

GIB = 2**30


@dataclass(frozen=True)
class ArmPlan:
    """One way to train.

    Attributes:
        peak: Bytes at the worst moment of the costliest step.
        at_peak: These bytes by kind, as `planner.ledger.KINDS`.
        saved: The most bytes that autograd keeps at a time; with the costliest layers, if the defense draws layers.
        mean_saved: The same over all its steps.
        relative_time: Work of a micro-batch, over all its steps, over that of supervised fine-tuning.
    """

    peak: int
    at_peak: dict[Kind, int]
    saved: int
    mean_saved: float
    relative_time: float


@dataclass(frozen=True)
class RemedyPlan:
    """Changed settings, planned.

    Attributes:
        changes: Keys of the recipe and their new values.
        peak: Bytes at the worst moment.
        fits: Whether that fits.
    """

    changes: dict[str, Any]
    peak: int
    fits: bool


@dataclass(frozen=True)
class RecipePlan:
    """What a recipe will cost.

    Attributes:
        defense: The recipe's.
        model_type: Architecture.
        num_layers: Decoder layers.
        num_trainable: Parameters that learn.
        arms: Plans by the value of `safety_defense:`.
        reserve: Bytes kept for the CUDA context and for fragmentation.
        gpu: Bytes of the GPU, `None` if none was named.
        fits: Whether the recipe's arm fits.
        remedies: What was tried if it does not, up to the first that fits.
        num_probes: Of an earlier run, by whose probabilities layers are taken to be drawn; 0 for uniform draws.
    """

    defense: str
    model_type: str
    num_layers: int
    num_trainable: int
    arms: dict[str, ArmPlan]
    reserve: int
    gpu: int | None = None
    fits: bool | None = None
    remedies: list[RemedyPlan] = field(default_factory=list)
    num_probes: int = 0

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return asdict(self)


def make_plan(
    recipe: Mapping[str, Any],
    *,
    gpu: int | None = None,
    reserve: int = GIB,
    model_config: Path | None = None,
    answer_share: float = 1.0,
    draws: Path | None = None,
    say: Callable[[str], None] = lambda _what: None,
) -> RecipePlan:
    """Plans a recipe that `own_problems` of `tvac_plugin.check` found nothing wrong with.

    Args:
        recipe: The YAML as the user wrote it.
        gpu: Bytes of the GPU.
        reserve: Bytes of it that tensors cannot have.
        model_config: A `config.json` instead of the one of `base_model`.
        answer_share: The part of the tokens that have a label.
        draws: The trace of a run, by whose probes layers are drawn.
        say: Told what is counted next.

    Raises:
        UserError: Nothing can be learned from `draws`.
        UserError: The recipe asks for what cannot be counted, or its model's shape is not at hand.
        UserError: The defense cannot work with the model.
    """
    name = str(recipe["safety_defense"])
    config = defense_config(dict(recipe))
    problem = draws_problem(config, name=name) if draws is not None else None
    if problem is not None:
        raise UserError(problem)
    shape = load_model_config(recipe, model_config)
    workload = read_workload(recipe, answer_share=answer_share)
    counter = StepCounter(build_fake_model(shape, workload), workload, _data_keys(recipe))
    probes = [] if draws is None else read_probes(draws, num_layers=counter.num_layers)
    say("a step without a defense")
    plain = counter.count(None)
    arms = {"none": ArmPlan(plain.peak, plain.at_peak, plain.saved, plain.saved, 1.0)}
    if config is not None:
        say(f"steps of {name}")
        arms[name] = _arm_of(counter, config, plain, workload.accumulation, probes)
    if "vaccine" not in arms:
        say("steps of vaccine")
        arms["vaccine"] = _arm_of(counter, VaccineConfig(), plain, workload.accumulation)
    fits = None if gpu is None else arms[name].peak + reserve <= gpu
    tried = []
    if gpu is not None and not fits:
        for changes in remedies(recipe, config):
            say(f"{name} with {', '.join(f'{key}: {value}' for key, value in changes.items())}")
            peak = _peak({**recipe, **changes}, model_config, answer_share, probes)
            tried.append(RemedyPlan(changes, peak, peak + reserve <= gpu))
            if tried[-1].fits:
                break
    return RecipePlan(
        name, shape.model_type, counter.num_layers, counter.num_trainable, arms, reserve, gpu, fits, tried, len(probes)
    )


def _arm_of(
    counter: StepCounter, config: DefenseConfig, plain: Cost, accumulation: int, probes: Probes = ()
) -> ArmPlan:
    cost = mean_cost(counter, config, accumulation=accumulation, probes=probes)
    heaviest, relative_time = cost.heaviest, cost.mean_flops / plain.flops
    return ArmPlan(heaviest.peak, heaviest.at_peak, cost.saved, cost.mean_saved, relative_time)


def _peak(recipe: Mapping[str, Any], model_config: Path | None, answer_share: float, probes: Probes) -> int:
    workload = read_workload(recipe, answer_share=answer_share)
    model = build_fake_model(load_model_config(recipe, model_config), workload)
    counter, config = StepCounter(model, workload, _data_keys(recipe)), defense_config(dict(recipe))
    if config is None:
        return counter.count(None).peak
    return heaviest_cost(counter, config, accumulation=workload.accumulation, probes=probes).peak


def _data_keys(recipe: Mapping[str, Any]) -> set[str]:
    return {key for key in DATA_KEYS if recipe.get(key)}
