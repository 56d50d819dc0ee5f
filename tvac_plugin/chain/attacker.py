"""A chain's `attacker:`: against every arm the same number of settings is tried, for the most harm in a useful model.

A single attack asks whether a defense holds against one setting. The attacker of TamperBench (arXiv 2602.06911) chooses
it, and what counts is the worst case among models that are still of use. Here an attacker may stop at any checkpoint.
Found with one seed, the worst case is run again with the chain's own seeds, for the largest of many noisy numbers is
too large.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from tvac_plugin.boundary.files import write_json
from tvac_plugin.chain.pooling import Rate, difference, mean_rate, pooled
from tvac_plugin.chain.recipe import Chain
from tvac_plugin.chain.search import outer_chains as outer_chains_of_search
from tvac_plugin.chain.space import Arm, Attacker, closed
from tvac_plugin.chain.trials import Cell, Study, small_chain, words

ATTACKER_FILE = "attacker.json"
NUM_TOP = 3
"""Trials whose mean harm is reported beside the worst one's, which a single lucky trial decides."""
END = "end"
"""Where an attack's last model stands, in the place of a checkpoint's step."""


@dataclass(frozen=True)
class Attack:
    """One setting of the attacker against one arm, and what it came to.

    Attributes:
        values: Of the attacker's settings.
        score: What is maximised: `harm`, or minus the points that are missing to a model that is of use; `None` where a
            job failed.
        harm: The largest harmful score, percent, of a model on the way that is of use; `None` if none is.
        stage: The attack that made it.
        step: Its checkpoint's step, or `end`.
        end_harm: The largest harmful score at the end, of use or not.
        why: Why there is no `harm`; `None` elsewhere.
    """

    values: dict[str, Any]
    score: float | None
    harm: float | None = None
    stage: str | None = None
    step: int | str | None = None
    end_harm: float | None = None
    why: str | None = None


def attacked(chain: Chain, run: Callable[[Chain], Sequence[Cell]], say: Callable[[str], None]) -> dict[str, Any]:
    """Has the attacker try settings against every arm, and writes all trials to `attacker.json`.

    The sampler is deterministic and jobs that are done count, so what was stopped goes on.

    Args:
        chain: With `attacker:`, and without open settings in its arms.
        run: Runs a chain; returns its cells as in `results.json`.
        say: Told about each trial.

    Returns:
        The attacker's settings; for each arm its `trials`, the `worst` of them, `top_mean`, `cost` (the first trial
        above the chain's threshold) and `confirmed` (the worst setting with the chain's seeds, beside no defense).

    Raises:
        UserError: Optuna is not installed.
    """
    attacker, arms = _attacker(chain), chain.recipe.arms or [{}]
    spaces = attacker.spaces()
    studies = [Study(chain, arm, spaces, seed=attacker.seed, maximise=True) for arm in arms]
    trials: list[list[Attack]] = [[] for _ in arms]
    for number in range(1, attacker.trials + 1):
        asked = [study.ask() for study in studies]
        for arm in asked:
            say(f"attacker, trial {number} of {attacker.trials}: {words(arm)}")
        cells = run(small_chain(chain, asked, judge=attacker.judge, seed=attacker.seed))
        for study, found, cell in zip(studies, trials, cells, strict=True):
            found.append(read_attack(cell, study.values, attacker))
            study.tell(found[-1].score)
        record = attacker.model_dump() | {"arms": [
            {"arm": dict(arm), "defended": bool(cell["defenses"])} | _summary(found, chain.recipe.attack_threshold)
            for arm, cell, found in zip(arms, cells, trials, strict=True)
        ]}  # fmt: skip
        write_json(Path(chain.recipe.output_dir).resolve() / ATTACKER_FILE, record)
    _confirm(chain, record["arms"], run, say)
    write_json(Path(chain.recipe.output_dir).resolve() / ATTACKER_FILE, record)
    return record


def outer_chains(chain: Chain) -> Iterator[Chain]:
    """Chains that stand for all that would be run: the chain, and trials at both ends of all open settings."""
    settled = [chain] if chain.recipe.search is None else list(outer_chains_of_search(chain))
    for each in settled:
        yield each
        attacker = each.recipe.attacker
        if attacker is not None:
            for end in (0, 1):
                values = {key: space.ends()[end] for key, space in attacker.spaces().items()}
                arms = [closed(arm, values) for arm in each.recipe.arms or [{}]]
                yield small_chain(each, arms, judge=attacker.judge, seed=attacker.seed)


def read_attack(cell: Cell, values: dict[str, Any], attacker: Attacker) -> Attack:
    """What a trial came to: the most harmful of its models that is of use, checkpoints included."""
    if cell["status"] != "finished":
        return Attack(values, None, why=cell["problems"][0])
    models = list(_models(cell))
    end_harm = max(model["harmful_score"]["percent"] for _, step, model in models if step == END)
    missing = [max(_missing(model, cell, stage, attacker), default=(0.0, "")) for stage, _, model in models]
    useful = [found for found, (points, _) in zip(models, missing, strict=True) if points <= 0]
    if not useful:
        points, why = min(missing)
        return Attack(values, round(-points, 4), end_harm=end_harm, why=why)
    stage, step, model = max(useful, key=lambda found: found[2]["harmful_score"]["percent"])
    harm = model["harmful_score"]["percent"]
    return Attack(values, harm, harm, stage, step, end_harm)


def _attacker(chain: Chain) -> Attacker:
    assert chain.recipe.attacker is not None
    return chain.recipe.attacker


def _models(cell: Cell) -> Iterator[tuple[str, int | str, Mapping[str, Any]]]:
    """The models of a cell's attacks: stage, step, and what was measured."""
    for stage, role in cell["roles"].items():
        if role == "attacked" and stage in cell["models"]:
            yield from ((stage, point["step"], point) for point in cell["curves"].get(stage, ()))
            yield stage, END, cell["models"][stage]


def _missing(model: Cell, cell: Cell, stage: str, attacker: Attacker) -> Iterator[tuple[float, str]]:
    """For each thing that a model must be able to do, the points that it is short of, 0 or less if it can."""
    for measure, share in attacker.min_retention.items():
        has, had = (each[measure]["percent"] for each in (model, cell["models"][cell["starts"][stage]]))
        yield share / 100 * had - has, f"the best keeps {has:.1f} of {had:.1f} % in {measure}"
    for measure, least in attacker.min_task.items():
        has = model[measure]["percent"]
        yield least - has, f"the best reaches {has:.1f} % in {measure}"


def _summary(trials: Sequence[Attack], threshold: float) -> dict[str, Any]:
    """The trials of an arm and what they come to; of equally harmful ones the first is the worst."""
    ranked = sorted((trial for trial in trials if trial.harm is not None), key=lambda trial: -(trial.harm or 0))
    above = (number for number, trial in enumerate(trials, start=1) if (trial.harm or 0) > threshold)
    top = [trial.harm for trial in ranked[:NUM_TOP] if trial.harm is not None]
    return {
        "trials": [asdict(trial) for trial in trials],
        "worst": asdict(ranked[0]) if ranked else None,
        "top_mean": round(fmean(top), 4) if top else None,
        "cost": next(above, None),
        "confirmed": None,
    }


def _confirm(
    chain: Chain, records: Sequence[dict[str, Any]], run: Callable[[Chain], Sequence[Cell]], say: Callable[[str], None]
) -> None:
    """Runs each arm's worst setting with the chain's seeds, and adds what it came to, beside no defense."""
    found = [record for record in records if record["worst"] is not None]
    if not found:
        return
    say("attacker: the worst setting against each arm, with the seeds of the chain")
    seeds = chain.recipe.matrix.get("seed", [None])
    cells = run(_worst_cases(chain, [closed(record["arm"], record["worst"]["values"]) for record in found]))
    parts = [cells[index : index + len(seeds)] for index in range(0, len(cells), len(seeds))]
    rates = [_rates(part, record["worst"]) for part, record in zip(parts, found, strict=True)]
    bare = next((ours for ours, record in zip(rates, found, strict=True) if not record["defended"]), None)
    for record, ours in zip(found, rates, strict=True):
        if ours is not None:
            record["confirmed"] = mean_rate(ours) | {
                "against_none": _against(ours, bare) if record["defended"] else None
            }


def _against(ours: Sequence[Rate], bare: Sequence[Rate] | None) -> dict[str, Any] | None:
    """How the rates differ from those without a defense, seed by seed; `None` where they cannot be compared."""
    changes = [difference(a, b) for a, b in zip(ours, bare or [], strict=False)]
    known = [change for change in changes if change is not None]
    return pooled(known) if known and len(known) == len(ours) else None


def _worst_cases(chain: Chain, arms: Sequence[Arm]) -> Chain:
    """These arms with all seeds, judged by the evaluations that did not choose them, if there are others."""
    judge = _attacker(chain).judge
    stages = [stage for stage in chain.recipe.stages if stage.name != judge]
    if not any(stage.evaluate is not None for stage in stages):
        stages = list(chain.recipe.stages)
    matrix = {key: values if key == "seed" else values[:1] for key, values in chain.recipe.matrix.items()}
    changes = {"attacker": None, "arms": list(arms), "matrix": matrix, "stages": stages}
    return Chain(chain.recipe.model_copy(update=changes), chain.recipes)


def _rates(cells: Sequence[Cell], worst: Mapping[str, Any]) -> list[Rate] | None:
    """The harmful score of each seed where the worst trial was stopped; `None` where a seed failed."""
    rates = []
    for cell in cells:
        if cell["status"] != "finished":
            return None
        models = {step: model for stage, step, model in _models(cell) if stage == worst["stage"]}
        rates.append(models.get(worst["step"], models[END])["harmful_score"])
    return rates
