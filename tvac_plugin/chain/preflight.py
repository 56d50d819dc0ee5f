"""What can be known to be wrong with a chain before its first job starts."""

from __future__ import annotations

from pydantic import ValidationError

from tvac_plugin.boundary.errors import did_you_mean, explain
from tvac_plugin.boundary.files import DATA_SUFFIXES, is_missing_folder
from tvac_plugin.boundary.paths import local_path
from tvac_plugin.chain.jobs import ChainPlan, Job, is_defended
from tvac_plugin.check import own_problems
from tvac_plugin.configs.base import DATA_KEYS
from tvac_plugin.evaluation.recipe import EvaluateRecipe
from tvac_plugin.recipes.reading import near_misses, plugin_problems


def plan_problems(plan: ChainPlan) -> list[str]:
    """Lists what is wrong with the recipes of a plan's jobs, each problem once."""
    found: dict[str, None] = {}
    for job in plan.jobs.values():
        problems = _training_problems(job) if job.kind == "train" else _evaluation_problems(job)
        found |= dict.fromkeys(f"{job.stage}: {problem}" for problem in problems)
    return [*found, *_utility_problems(plan)]


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


def _training_problems(job: Job) -> list[str]:
    problems = near_misses(job.recipe) + own_problems(job.recipe)
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


def _evaluation_problems(job: Job) -> list[str]:
    if job.kind != "evaluate":
        return []
    try:
        EvaluateRecipe.model_validate(job.recipe)
    except ValidationError as error:
        return explain(error)
    return []
