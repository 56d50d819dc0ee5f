"""Runs an evaluation: every measure of a recipe on every model, with all answers kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets

from tvac_plugin.evaluation.generation import Generator
from tvac_plugin.evaluation.judges import JUDGES, Exchange, Judge, Verdict, load_judge
from tvac_plugin.evaluation.pretrained import folder_or_hub_id
from tvac_plugin.evaluation.prompts import Prompt, load_prompts
from tvac_plugin.evaluation.rates import Rate, rate
from tvac_plugin.evaluation.recipe import Accuracy, EvaluateRecipe, Judged
from tvac_plugin.files import checkpoints, is_missing_folder, write_json
from tvac_plugin.overlap import text_hash

RESULTS_FILE = "evaluation.json"
FORMAT = 1


def evaluate(recipe: EvaluateRecipe, *, rejudge: bool = False) -> dict[str, Any]:
    """Measures every model of a recipe; writes answers as JSONL and the results as JSON.

    Args:
        recipe: What to measure.
        rejudge: Read the answers of an earlier run again instead of generating.

    Returns:
        The results, as written to `evaluation.json` in the recipe's `output_dir`.

    Raises:
        ValueError: There is no model, prompts or answers are missing, or too many answers cannot be scored.
    """
    models = recipe.models | _checkpoints(recipe.checkpoints_of)
    if not models and recipe.checkpoints_of is not None:
        raise ValueError(
            f"checkpoints_of: {recipe.checkpoints_of} has no folder `checkpoint-N` with a step N. Correct the path."
        )
    if not models:
        raise ValueError("evaluate recipe: no model to evaluate. Add `models: {name: folder}`.")
    datasets.disable_progress_bars()
    output = Path(recipe.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    run = _Evaluation(recipe, output, rejudge=rejudge)
    results = {
        "format": FORMAT,
        "recipe": recipe.model_dump(),
        "models": {name: run.model(name, path) for name, path in models.items()},
    }
    write_json(output / RESULTS_FILE, results)
    return results


def _checkpoints(run: str | None) -> dict[str, str]:
    return {} if run is None else {f"step {step}": str(folder) for step, folder in checkpoints(Path(run)).items()}


class _Evaluation:
    """One run; prompts and judges are loaded once, one model is in memory at a time."""

    def __init__(self, recipe: EvaluateRecipe, output: Path, *, rejudge: bool) -> None:
        self._recipe = recipe
        self._output = output
        self._rejudge = rejudge
        self._judges: dict[str, Judge] = {}
        self._prompts: dict[str, list[Prompt]] = {
            name: load_prompts(source.prompts, key=_key(name, source), need_reference=isinstance(source, Accuracy))
            for name, source in self._sources()
            if source.prompts is not None
        }

    def _sources(self) -> list[tuple[str, Judged | Accuracy]]:
        judged = [("harmful_score", self._recipe.harmful_score), ("over_refusal", self._recipe.over_refusal)]
        return [*((name, j) for name, j in judged if j), *self._recipe.accuracy.items()]

    def model(self, name: str, path: str) -> dict[str, Any]:
        generator: list[Generator] = []

        def loaded() -> Generator:
            if not generator:
                generator.append(self._load(name, path))
            return generator[0]

        return {measure: self._measure(name, measure, source, loaded) for measure, source in self._sources()}

    def _load(self, name: str, path: str) -> Generator:
        if is_missing_folder(path):
            raise ValueError(f"models.{name}: {path} does not exist. Train it first, or correct the path.")
        recipe = self._recipe
        try:
            return Generator.load(
                folder_or_hub_id(path), prompt_format=recipe.prompt_format, trust_remote_code=recipe.trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"models.{name}: {path} cannot be loaded: {error}") from error

    def _measure(
        self, model: str, measure: str, source: Judged | Accuracy, generator: Callable[[], Generator]
    ) -> dict[str, Any]:
        if isinstance(source, Accuracy) and source.task is not None:
            from tvac_plugin.evaluation.harness import harness_accuracy

            return harness_accuracy(source, generator(), self._recipe, measure=measure)
        exchanges = self._exchanges(model, measure, source, generator)
        if isinstance(source, Judged):
            verdicts = self._judge(source).read(exchanges, batch_size=self._recipe.batch_size)
            flags = [v.harmful if measure == "harmful_score" else v.refused for v in verdicts]
            about = {"judge": source.judge, "judge_note": JUDGES[source.judge].note}
        else:
            verdicts = [Verdict(None, None)] * len(exchanges)
            flags = [e.row["reference"] == e.answer for e in exchanges]
            about = {"judge": "exact match with the reference answer"}
        self._write(model, measure, exchanges, verdicts)
        result = rate(flags, what=f"{model}, {measure}", max_unscored=self._recipe.max_unscored)
        prompts_hash = text_hash(exchange.prompt for exchange in exchanges)
        return {**_shown(result), **about, "prompts_sha256": prompts_hash}

    def _exchanges(
        self, model: str, measure: str, source: Judged | Accuracy, generator: Callable[[], Generator]
    ) -> list[Exchange]:
        prompts = self._prompts[measure]
        if self._rejudge:
            answers = self._read(model, measure, prompts)
        else:
            texts = [generator().prompt(prompt.text) for prompt in prompts]
            answers = generator().complete(
                texts,
                max_new_tokens=source.max_new_tokens,
                batch_size=self._recipe.batch_size,
                description=f"{model}, {measure}",
            )
        return [
            Exchange(prompt.text, answer, {**prompt.row, "reference": prompt.reference})
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def _judge(self, source: Judged) -> Judge:
        key = json.dumps([source.judge, source.judge_model, source.threshold])
        if key not in self._judges:
            try:
                self._judges[key] = load_judge(
                    source.judge, weights=source.judge_model, threshold=source.threshold,
                    trust_remote_code=self._recipe.trust_remote_code,
                )  # fmt: skip
            except OSError as error:
                weights = source.judge_model or JUDGES[source.judge].weights
                raise ValueError(
                    f"judge {source.judge}: {weights} cannot be loaded: {error} Set `judge_model:` to a folder "
                    "with the weights, or let it be downloaded with HF_HUB_OFFLINE=0."
                ) from error
        return self._judges[key]

    def _path(self, model: str, measure: str) -> Path:
        return self._output / "answers" / f"{model}.{measure}.jsonl"

    def _read(self, model: str, measure: str, prompts: Sequence[Prompt]) -> list[str]:
        path = self._path(model, measure)
        if not path.is_file():
            raise ValueError(f"{path}: no answers to judge again. Run without --rejudge first.")
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if [row["prompt"] for row in rows] != [prompt.text for prompt in prompts]:
            raise ValueError(f"{path}: the answers are to other prompts. Run without --rejudge.")
        return [row["answer"] for row in rows]

    def _write(self, model: str, measure: str, exchanges: Sequence[Exchange], verdicts: Sequence[Verdict]) -> None:
        path = self._path(model, measure)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            json.dumps({"prompt": e.prompt, "answer": e.answer, "reference": e.row["reference"], **v._asdict()})
            for e, v in zip(exchanges, verdicts, strict=True)
        ]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _key(name: str, source: Judged | Accuracy) -> str:
    return f"accuracy.{name}.prompts" if isinstance(source, Accuracy) else f"{name}.prompts"


def _shown(result: Rate) -> dict[str, Any]:
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(result).items()}
