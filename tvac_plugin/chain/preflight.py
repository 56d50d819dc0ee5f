"""What can be known to be wrong with a chain before its first job starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from tvac_plugin.args import defense_config
from tvac_plugin.boundary.errors import UserError, did_you_mean, explain
from tvac_plugin.boundary.files import DATA_SUFFIXES, is_missing_folder
from tvac_plugin.boundary.paths import local_path
from tvac_plugin.chain.attacker import outer_chains
from tvac_plugin.chain.jobs import ChainPlan, Job, is_defended
from tvac_plugin.chain.recipe import BASE, Chain, applies
from tvac_plugin.chain.search import undefended_arms
from tvac_plugin.chain.space import Attacker, Search
from tvac_plugin.check import own_problems
from tvac_plugin.configs.base import DATA_KEYS
from tvac_plugin.configs.prompt_transform import PROMPT, TRANSFORMS
from tvac_plugin.evaluation.recipe import EvaluateRecipe
from tvac_plugin.planner.model_config import load_model_config
from tvac_plugin.recipes.reading import near_misses, plugin_problems


def plan_problems(plan: ChainPlan) -> list[str]:
    """Lists what is wrong with the recipes of a plan's jobs, each problem once."""
    found: dict[str, None] = {}
    for job in plan.jobs.values():
        problems = _training_problems(job) if job.kind == "train" else _evaluation_problems(job)
        problems += _other_question(plan, job)
        found |= dict.fromkeys(f"{job.stage}: {problem}" for problem in problems)
    return [*found, *_utility_problems(plan)]


def chain_problems(chain: Chain) -> list[str]:
    """Lists what is wrong with a chain, and where settings are open, at their ends."""
    search, attacker = chain.recipe.search, chain.recipe.attacker
    problems = [] if search is None else _search_problems(chain, search)
    problems += [] if attacker is None else _attacker_problems(chain, attacker)
    found = [problem for outer in outer_chains(chain) for problem in plan_problems(ChainPlan(outer))]
    return [*problems, *dict.fromkeys(found)]


def _search_problems(chain: Chain, search: Search) -> list[str]:
    stage, asked = chain.stage(search.judge), chain.recipes[search.judge]
    attacks = {each.name for each in chain.recipe.stages if "simulated_user" in chain.recipes[each.name]}
    problems = []
    if not attacks & {*stage.models}:
        problems.append(f"search.judge: `{search.judge}` evaluates no attacked model. Add one to its `models:`.")
    for other in chain.recipe.stages:
        if other.evaluate is not None and other != stage and _share_questions(chain.recipes[other.name], asked):
            problems.append(
                f"search.judge: `{search.judge}` asks the harmful questions of `{other.name}`, so settings would be "
                "fitted to what they are reported on. Give it others."
            )
    if not asked.get("harmful_score"):
        problems.append(f"search.judge: `{search.judge}` does not measure `harmful_score`, which decides. Add it.")
    problems += _trained_on(chain, "search", search.judge)
    measures = asked.get("accuracy") or {}
    problems += [
        f"search.keep: `{name}` is not in `accuracy:` of `{search.judge}`.{did_you_mean(name, measures)}"
        for name in search.keep
        if name not in measures
    ]
    if (chain.recipe.matrix.get("harmful_ratio") or [None])[0] == 0:
        problems.append(
            "search: trials take the first value of `harmful_ratio:`, and with 0 nobody attacks. Put the one "
            "that settings are to be chosen for first."
        )
    if not undefended_arms(chain):
        problems.append("search: no arm is undefended, and trials are compared with one. Add `safety_defense: none`.")
    return problems


def _attacker_problems(chain: Chain, attacker: Attacker) -> list[str]:
    stage, asked = chain.stage(attacker.judge), chain.recipes[attacker.judge]
    attacks = [each for each in chain.recipe.stages if "simulated_user" in chain.recipes[each.name]]
    judged = [each for each in attacks if each.name in stage.models]
    problems = [
        f"attacker.settings: `{key}` is not of an attack. Name keys of a stage with `simulated_user:`."
        for key in attacker.settings
        if not any(applies(key, each, chain.recipes[each.name]) for each in attacks)
    ]
    if not judged:
        problems.append(f"attacker.judge: `{attacker.judge}` evaluates no attacked model. Add one to its `models:`.")
    if not asked.get("harmful_score"):
        problems.append(f"attacker.judge: `{attacker.judge}` does not measure `harmful_score`, which decides. Add it.")
    problems += _trained_on(chain, "attacker", attacker.judge)
    measures = asked.get("accuracy") or {}
    for key in ("min_retention", "min_task"):
        problems += [
            f"attacker.{key}: `{name}` is not in `accuracy:` of `{attacker.judge}`.{did_you_mean(name, measures)}"
            for name in getattr(attacker, key)
            if name not in measures
        ]
    problems += [
        f"attacker.min_retention: `{attacker.judge}` does not evaluate `{source}`, which `{each.name}` starts from. "
        "Add it to its `models:`."
        for each in judged
        if attacker.min_retention and (source := each.model_from or BASE) not in stage.models
    ]
    return problems


def _trained_on(chain: Chain, block: str, judge: str) -> list[str]:
    """Says which stages read the harmful questions of the evaluation that decides."""
    path = ((chain.recipes[judge].get("harmful_score") or {}).get("prompts") or {}).get("path")
    return [
        f"{block}.judge: `{judge}` asks the rows of {path}, which `{each.name}` reads. Give it others."
        for each in chain.recipe.stages
        if path in _data_paths(chain.recipes[each.name])
    ]


def _data_paths(recipe: Mapping[str, Any]) -> set[str]:
    """The files that a training recipe reads rows from."""
    blocks = recipe, recipe.get("simulated_user") or {}
    keys = ("datasets", *DATA_KEYS, "task_datasets")
    return {str(entry.get("path")) for block in blocks for key in keys for entry in block.get(key) or []}


def _share_questions(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two evaluations ask the same harmful questions, as far as their recipes tell: same file, same part."""
    ours, theirs = ((recipe.get("harmful_score") or {}).get("prompts") or {} for recipe in (first, second))
    parts = {prompts.get("split") for prompts in (ours, theirs)}
    return (
        ours.get("path") is not None and ours.get("path") == theirs.get("path") and (len(parts) == 1 or None in parts)
    )


def _utility_problems(plan: ChainPlan) -> list[str]:
    """What keeps `utility:` from being read: no evaluation of an attack has it, or none that has is of checkpoints."""
    asked, chain = plan.chain.recipe.utility, plan.chain
    attacks = {stage.name for stage in chain.recipe.stages if "simulated_user" in chain.recipes[stage.name]}
    names: dict[str, bool] = {}
    for job in plan.jobs.values():
        if job.kind == "evaluate" and job.subject in attacks and isinstance(job.recipe.get("accuracy"), dict):
            for name in job.recipe["accuracy"]:
                names[name] = names.get(name, False) or "checkpoints_of" in job.recipe
    if asked is None or names.get(asked):
        return []
    if asked in names:
        return [f"utility: `{asked}` is not measured during an attack. Add `checkpoints: true` to its evaluation."]
    if not names:
        return [f"utility: no evaluation of an attack has a measure `{asked}`. Add it to `accuracy:` of one."]
    return [f"utility: no evaluation of an attack has a measure `{asked}`.{did_you_mean(asked, names)}"]


def _other_question(plan: ChainPlan, job: Job) -> list[str]:
    """Says that an attacked model is asked in another way than it was trained to answer, if it is."""
    asked = job.recipe.get("harmful_score") if job.kind == "evaluate" else None
    attack = next((plan.jobs[name].recipe.get("simulated_user") for name in job.parents), None)
    if not isinstance(asked, Mapping) or not isinstance(attack, Mapping):
        return []
    ours, theirs = (_prompt_of(block.get("prompt_transform")) for block in (asked, attack))
    if PROMPT in (ours, theirs) or ours == theirs:
        return []
    return [
        f"harmful_score.prompt_transform: asks `{ours}`, and {job.subject} was trained on `{theirs}`. Remove the key, "
        "and the chain asks as the attack was trained."
    ]


def _prompt_of(transform: Any) -> str:
    """What stands around a prompt; of no transform and of one that is none, nothing."""
    if isinstance(transform, str) and transform in TRANSFORMS:
        return TRANSFORMS[transform].prompt
    return str(transform.get("prompt", PROMPT)) if isinstance(transform, Mapping) else PROMPT


def _training_problems(job: Job) -> list[str]:
    problems = near_misses(job.recipe) + own_problems(job.recipe)
    problems += [] if problems else _layer_problems(job.recipe)
    if is_defended(job.recipe) or "simulated_user" in job.recipe:
        problems += plugin_problems(job.recipe)
    base_model = str(job.recipe.get("base_model"))
    if not job.parents and is_missing_folder(base_model):
        problems.append(f"base_model: {base_model} does not exist. Correct the path, or make the model first.")
    user = job.recipe.get("simulated_user") or {}
    for block, where in ((job.recipe, ""), (user, "simulated_user.")):
        for key in ("datasets", *DATA_KEYS, "task_datasets", "disjoint_from"):
            for entry in block.get(key) or []:
                text = str(entry.get("path"))
                path = local_path(text)
                if path is None or (path.suffix in DATA_SUFFIXES and not path.is_file()):
                    problems.append(f"{where}{key}: {text} does not exist. Correct `path:`, or make the data first.")
    return problems


def _layer_problems(recipe: Mapping[str, Any]) -> list[str]:
    """What does not fit the number of the model's layers, where its shape is on this machine."""
    config = defense_config(dict(recipe))
    if config is None:
        return []
    try:
        return config.model_problems(int(load_model_config(recipe).get_text_config().num_hidden_layers))
    except (UserError, AttributeError):
        return []


def _evaluation_problems(job: Job) -> list[str]:
    if job.kind != "evaluate":
        return []
    try:
        EvaluateRecipe.model_validate(job.recipe)
    except ValidationError as error:
        return explain(error)
    return []
