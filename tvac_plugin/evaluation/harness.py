"""Accuracy on tasks of lm-evaluation-harness, among them the papers' SST-2, AG News and GSM8K as generation tasks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from tvac_plugin.evaluation.generation import Generator
from tvac_plugin.evaluation.rates import rate
from tvac_plugin.evaluation.recipe import Accuracy, EvaluateRecipe

TASKS = Path(__file__).parent / "tasks"


def harness_accuracy(source: Accuracy, generator: Generator, recipe: EvaluateRecipe, *, measure: str) -> dict[str, Any]:
    """Runs one task on a loaded model.

    Returns:
        The rate of right items with its interval, or the harness's own mean where items are not simply right or wrong.

    Raises:
        ValueError: The harness does not know the task.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS))
    if source.task not in manager.all_tasks:
        raise ValueError(f"accuracy: the evaluation harness has no task `{source.task}`. Run `lm-eval ls tasks`.")
    model = HFLM(pretrained=generator.model, tokenizer=generator.tokenizer, batch_size=recipe.batch_size)
    result = simple_evaluate(
        model=model,
        tasks=[source.task],
        task_manager=manager,
        limit=source.limit,
        apply_chat_template=True,
        bootstrap_iters=0,
        log_samples=True,
    )
    metric = _metric(result["results"][source.task])
    values = [sample[metric] for sample in result["samples"][source.task]]
    about = {"judge": f"lm-evaluation-harness {source.task}, {metric}"}
    if all(value in (0, 1) for value in values):
        found = rate([bool(value) for value in values], what=measure, max_unscored=recipe.max_unscored)
        return {
            "percent": round(found.percent, 4), "low": round(found.low, 4), "high": round(found.high, 4),
            "num_scored": found.num_scored, "num_unscored": 0, **about,
        }  # fmt: skip
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values) / len(values))
    low, high = 100 * (mean - 1.96 * spread), 100 * (mean + 1.96 * spread)
    return {
        "percent": round(100 * mean, 4), "low": round(low, 4), "high": round(high, 4),
        "num_scored": len(values), "num_unscored": 0, **about,
    }  # fmt: skip


def _metric(results: dict[str, Any]) -> str:
    names = [key.split(",")[0] for key in results if "," in key and "stderr" not in key]
    return next((name for name in ("acc", "exact_match") if name in names), names[0])
