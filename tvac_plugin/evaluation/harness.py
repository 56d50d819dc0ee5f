"""Accuracy on tasks of lm-evaluation-harness, among them the papers' SST-2, AG News and GSM8K as generation tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.evaluation.generation import Generator
from tvac_plugin.evaluation.rates import Rate, rate
from tvac_plugin.evaluation.recipe import Accuracy

TASKS = Path(__file__).parent / "tasks"


class HarnessTask:
    """A task, or a group or tag of several, that one model after the other is measured by."""

    def __init__(self, source: Accuracy, *, measure: str) -> None:
        """Loads the data, to see how they are scored before a model is loaded.

        Raises:
            UserError: The harness does not know the task, or its items have no one score that is counted or averaged.
        """
        from lm_eval.evaluator_utils import get_task_list
        from lm_eval.tasks import TaskManager, get_task_dict

        self._source, self._measure = source, measure
        self._manager = TaskManager(include_path=str(TASKS))
        if source.task not in self._manager.all_tasks:
            raise UserError(
                f"accuracy.{measure}: the evaluation harness has no task `{source.task}`. Run `lm-eval ls tasks`."
            )
        tasks = get_task_list(get_task_dict([source.task], self._manager))
        metrics = {task.task_name: _metric(task.task.aggregation()) for task in tasks}
        self._metric, *others = dict.fromkeys(metrics.values())
        if others or not self._metric:
            raise UserError(
                f"accuracy.{measure}: the items of `{source.task}` have no score in common that can be averaged. Name "
                f"a task whose items are right or wrong, one of its own if it has some: {', '.join(metrics)}."
            )

    def accuracy(self, generator: Generator, *, batch_size: int) -> dict[str, Any]:
        """Runs all its items on a loaded model, each filtered by its task's first filter.

        Returns:
            The rate of right items with its interval, or their mean where they are not simply right or wrong.
        """
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        samples = simple_evaluate(
            model=HFLM(pretrained=generator.model, tokenizer=generator.tokenizer, batch_size=batch_size),
            tasks=[self._source.task],
            task_manager=self._manager,
            limit=self._source.limit,
            apply_chat_template=True,
            bootstrap_iters=0,
            log_samples=True,
        )["samples"]
        values = [item[self._metric] for items in samples.values() for item in _first_filter(items)]
        return {**_mean(values, what=self._measure).as_json(), "judge": self._label(samples)}

    def _label(self, samples: dict[str, list[dict[str, Any]]]) -> str:
        filters = dict.fromkeys(items[0]["filter"] for items in samples.values())
        names = [self._metric, *(name for name in filters if name != "none")]
        several = f" over all items of {len(samples)} tasks" if len(samples) > 1 else ""
        return f"lm-evaluation-harness {self._source.task}, {', '.join(names)}{several}"


def _metric(aggregations: dict[str, Any]) -> str:
    """Of the metrics whose mean is taken over the items, the one that says how many are right, or else the first."""
    from lm_eval.api.metrics import mean

    names = [name for name, aggregation in aggregations.items() if aggregation is mean]
    return next((name for name in ("acc", "exact_match", *names) if name in names), "")


def _first_filter(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The harness scores each item once for each of a task's filters, and lists all of that."""
    return [item for item in items if item["filter"] == items[0]["filter"]]


def _mean(values: Sequence[float], *, what: str) -> Rate:
    if set(values) <= {0, 1}:
        return rate(map(bool, values), what=what, max_unscored=0)
    mean, half = 100 * fmean(values), 100 * 1.96 * pstdev(values) / math.sqrt(len(values))
    return Rate(mean, mean - half, mean + half, len(values), num_unscored=0)
