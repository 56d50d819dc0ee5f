"""Runs an evaluation: every measure of a recipe on every model, with all answers kept.

Models answer first, one after the other; then judges read, one after the other. No two of them are in memory together.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from accelerate.utils import release_memory

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.boundary.files import checkpoints, is_missing_folder, write_json
from tvac_plugin.configs.prompt_transform import PROMPT
from tvac_plugin.data.fingerprints import text_hash
from tvac_plugin.evaluation.agreement import Agreement
from tvac_plugin.evaluation.answers import AnswerFiles, exchanges_of
from tvac_plugin.evaluation.generation import Generator
from tvac_plugin.evaluation.harness import HarnessTask
from tvac_plugin.evaluation.judges import Exchange, Judge, Verdict, judge_entry, load_judge
from tvac_plugin.evaluation.matches import MATCHES
from tvac_plugin.evaluation.pretrained import folder_or_hub_id
from tvac_plugin.evaluation.prompts import Prompt, load_prompts
from tvac_plugin.evaluation.rates import rate
from tvac_plugin.evaluation.recipe import Accuracy, EvaluateRecipe, Judged
from tvac_plugin.evaluation.retention import AnswerLoss, RowLoss, answer_losses, retained_prompts, retention, row_losses

RESULTS_FILE = "evaluation.json"
RETENTION = "retention"
FORMAT = 1


def evaluate(recipe: EvaluateRecipe, *, rejudge: bool = False) -> dict[str, Any]:
    """Measures every model of a recipe; writes answers as JSONL and the results as JSON.

    Args:
        recipe: What to measure.
        rejudge: Read the answers of an earlier run again instead of generating.

    Returns:
        The results, as written to `evaluation.json` in the recipe's `output_dir`.

    Raises:
        UserError: There is no model, prompts or answers are missing, or too many answers cannot be scored.
    """
    models = _models(recipe)
    datasets.disable_progress_bars()
    output = Path(recipe.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    run = _Evaluation(recipe, AnswerFiles(output / "answers"))
    if rejudge:
        run.read(models)
    else:
        run.generate(models)
    run.judge()
    results = {"format": FORMAT, "recipe": recipe.model_dump(), "models": {name: run.rates(name) for name in models}}
    write_json(output / RESULTS_FILE, results)
    return results


def _models(recipe: EvaluateRecipe) -> dict[str, str]:
    run = recipe.checkpoints_of
    steps = {} if run is None else {f"step {step}": str(path) for step, path in checkpoints(Path(run)).items()}
    models = recipe.models | steps
    if not models and run is not None:
        raise UserError(f"checkpoints_of: {run} has no folder `checkpoint-N` with a step N. Correct the path.")
    if not models:
        raise UserError("evaluate recipe: no model to evaluate. Add `models: {name: folder}`.")
    return models


class _Reader(NamedTuple):
    """A judge as a recipe asks for it."""

    judge: str
    weights: str | None
    threshold: float | None

    @classmethod
    def of(cls, source: Judged) -> _Reader:
        return cls(source.judge, source.judge_model, source.threshold)

    @classmethod
    def second_of(cls, source: Judged) -> _Reader | None:
        return None if source.second_judge is None else cls(source.second_judge, None, None)

    def load(self, *, trust_remote_code: bool) -> Judge:
        try:
            return load_judge(
                self.judge, weights=self.weights, threshold=self.threshold, trust_remote_code=trust_remote_code
            )
        except OSError as error:
            weights = self.weights or judge_entry(self.judge).weights
            if weights is None:
                raise UserError(
                    f"judge {self.judge}: cannot be made: {error} Mend its `__init__`. The answers are kept: --rejudge "
                    "reads them."
                ) from error
            raise UserError(
                f"judge {self.judge}: {weights} cannot be loaded: {error} Set `judge_model:` to a folder with the "
                "weights, or let it be downloaded with HF_HUB_OFFLINE=0. The answers are kept: --rejudge reads them."
            ) from error


class _Evaluation:
    """One run: `generate` or `read`, then `judge`, then `rates`. Answers are known by model and measure."""

    def __init__(self, recipe: EvaluateRecipe, files: AnswerFiles) -> None:
        judged = {"harmful_score": recipe.harmful_score, "over_refusal": recipe.over_refusal}
        self._recipe, self._files = recipe, files
        self._judged = {measure: source for measure, source in judged.items() if source}
        self._sources: dict[str, Judged | Accuracy] = {**self._judged, **recipe.accuracy}
        self._tasks = {measure: source for measure, source in recipe.accuracy.items() if source.task is not None}
        self._prompts: dict[str, list[Prompt]] = {
            measure: _as_asked(
                load_prompts(
                    source.prompts,
                    key=_key(measure, source),
                    need_reference=isinstance(source, Accuracy),
                    need_columns=_columns(measure, source),
                ),
                source,
            )
            for measure, source in self._sources.items()
            if source.prompts is not None
        }
        self._retained = [] if recipe.retention is None else retained_prompts(recipe.retention)
        self._losses: dict[str, list[RowLoss]] = {}
        self._exchanges: dict[tuple[str, str], list[Exchange]] = {}
        self._verdicts: dict[tuple[str, str], list[Verdict]] = {}
        self._second: dict[tuple[str, str], list[Verdict]] = {}
        self._found: dict[tuple[str, str], dict[str, Any]] = {}

    def read(self, models: Collection[str]) -> None:
        """Takes the answers from an earlier run."""
        for model in models:
            for measure, prompts in self._prompts.items():
                self._exchanges[model, measure] = self._files.read(model, measure, prompts)
            for measure, source in self._tasks.items():
                self._found[model, measure] = self._files.read_rate(model, measure, source)
            if self._recipe.retention is not None:
                self._losses[model] = self._files.read_losses(model, RETENTION, self._recipe.retention, self._retained)

    def generate(self, models: Mapping[str, str]) -> None:
        """Has every model answer everything, and writes the answers."""
        for model, path in models.items():
            if is_missing_folder(path):
                raise UserError(f"models.{model}: {path} does not exist. Train it first, or correct the path.")
        tasks = {measure: HarnessTask(source, measure=measure) for measure, source in self._tasks.items()}
        source = self._recipe.retention
        base = [] if source is None else self._base_losses(str(source.of))
        release_memory()
        for model, path in models.items():
            self._generate(model, path, tasks, base)
            release_memory()

    def _base_losses(self, path: str) -> list[AnswerLoss]:
        if is_missing_folder(path):
            raise UserError(f"retention.of: {path} does not exist. Make it first, or correct the path.")
        return self._answer_losses(self._load("retention.of", path), "retention.of")

    def _answer_losses(self, generator: Generator, name: str) -> list[AnswerLoss]:
        size = self._recipe.batch_size
        return answer_losses(generator, self._retained, batch_size=size, description=f"{name}, {RETENTION}")

    def _generate(self, model: str, path: str, tasks: Mapping[str, HarnessTask], base: Sequence[AnswerLoss]) -> None:
        generator = self._load(f"models.{model}", path)
        for measure, prompts in self._prompts.items():
            answers = generator.complete(
                [generator.prompt(prompt.asked or prompt.text) + prompt.prefill for prompt in prompts],
                max_new_tokens=self._sources[measure].max_new_tokens,
                batch_size=self._recipe.batch_size,
                description=f"{model}, {measure}",
            )
            whole = [f"{prompt.prefill} {answer}".strip() for prompt, answer in zip(prompts, answers, strict=True)]
            exchanges = self._exchanges[model, measure] = exchanges_of(prompts, whole)
            self._files.write(model, measure, exchanges)
        for measure, task in tasks.items():
            found = self._found[model, measure] = task.accuracy(generator, batch_size=self._recipe.batch_size)
            self._files.write_rate(model, measure, self._tasks[measure], found)
        if self._recipe.retention is not None:
            ours = self._answer_losses(generator, model)
            losses = self._losses[model] = row_losses(ours, base, what=f"{model}, {RETENTION}")
            self._files.write_losses(model, RETENTION, self._recipe.retention, self._retained, losses)

    def _load(self, key: str, path: str) -> Generator:
        recipe = self._recipe
        try:
            return Generator.load(
                folder_or_hub_id(path), prompt_format=recipe.prompt_format, trust_remote_code=recipe.trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise UserError(f"{key}: {path} cannot be loaded: {error}") from error

    def judge(self) -> None:
        """Has every judge read what it is asked to, and writes the verdicts beside the answers."""
        first = [_Reader.of(source) for source in self._judged.values()]
        second = [_Reader.second_of(source) for source in self._judged.values()]
        for reader in dict.fromkeys(reader for reader in [*first, *second] if reader is not None):
            self._judge(reader)
            release_memory()

    def _judge(self, reader: _Reader) -> None:
        judge = reader.load(trust_remote_code=self._recipe.trust_remote_code)
        for (model, measure), exchanges in self._exchanges.items():
            source = self._judged.get(measure)
            if source is not None and reader in (_Reader.of(source), _Reader.second_of(source)):
                verdicts = judge.read(exchanges, batch_size=self._recipe.batch_size)
                if len(verdicts) != len(exchanges):
                    raise UserError(
                        f"judge: {reader.judge} gave {len(verdicts)} verdicts on {len(exchanges)} answers. Have its "
                        "`read` return one for each; --rejudge reads the answers again."
                    )
                self._take(model, measure, verdicts, is_second=reader != _Reader.of(source))

    def _take(self, model: str, measure: str, verdicts: list[Verdict], *, is_second: bool) -> None:
        """Keeps verdicts, and writes them beside the answers."""
        (self._second if is_second else self._verdicts)[model, measure] = verdicts
        found = (said.get((model, measure)) for said in (self._verdicts, self._second))
        self._files.write(model, measure, self._exchanges[model, measure], *found)

    def rates(self, model: str) -> dict[str, Any]:
        """What was found of one model, by measure."""
        found = {measure: self._found.get((model, measure)) or self._rate(model, measure) for measure in self._sources}
        source = self._recipe.retention
        if source is None:
            return found
        prompts_hash = text_hash(f"{prompt.text}\n{prompt.reference}" for prompt in self._retained)
        kept = retention(self._losses[model]) | {"of": source.of, "prompts_sha256": prompts_hash}
        return found | {RETENTION: kept}

    def _rate(self, model: str, measure: str) -> dict[str, Any]:
        exchanges, source = self._exchanges[model, measure], self._sources[measure]
        if isinstance(source, Judged):
            verdicts = self._verdicts[model, measure]
            is_harm = measure == "harmful_score"
            flags = _flags(measure, verdicts)
            about: dict[str, Any] = {"judge": source.judge, "judge_note": judge_entry(source.judge).note}
            about |= (_num_neither(verdicts) if is_harm else {}) | _manner(source)
            if source.second_judge is not None:
                agreement = Agreement.of(flags, _flags(measure, self._second[model, measure]))
                about["second_judge"] = {"judge": source.second_judge, **agreement.as_json()}
        else:
            is_right = MATCHES[source.match]
            flags = [is_right(e.row["reference"], e.answer) for e in exchanges]
            about = {"judge": f"{source.match} match with the reference answer"}
        result = rate(flags, what=f"{model}, {measure}", max_unscored=self._recipe.max_unscored)
        prompts_hash = text_hash(prompt.whole for prompt in self._prompts[measure])
        return {**result.as_json(), **about, "prompts_sha256": prompts_hash}


def _flags(measure: str, verdicts: Sequence[Verdict]) -> list[bool | None]:
    """What a measure counts."""
    return [verdict.harmful if measure == "harmful_score" else verdict.refused for verdict in verdicts]


def _num_neither(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """How many answers are neither harmful nor refusals, by a judge that tells both."""
    told = [verdict.neither for verdict in verdicts if verdict.neither is not None]
    return {"num_neither": sum(told)} if told else {}


def _as_asked(prompts: list[Prompt], source: Judged | Accuracy) -> list[Prompt]:
    """Prompts with what a measure rewrites in them, and what it makes answers begin with."""
    if isinstance(source, Accuracy) or not _manner(source):
        return prompts
    transform = source.prompt_transform
    return [
        prompt._replace(asked=None if transform is None else transform.asked(prompt.text), prefill=source.prefill)
        for prompt in prompts
    ]


def _manner(source: Judged) -> dict[str, str]:
    """How a measure asks, where that is not plainly."""
    transform = source.prompt_transform
    rewritten = None if transform is None or transform.prompt == PROMPT else transform.prompt
    return {key: value for key, value in (("asked", rewritten), ("prefill", source.prefill)) if value}


def _columns(measure: str, source: Judged | Accuracy) -> list[str]:
    """What the rows of a measure must hold for its judges."""
    if measure != "harmful_score" or isinstance(source, Accuracy):
        return []
    columns = [judge_entry(name).column for name in (source.judge, source.second_judge) if name is not None]
    return [column for column in columns if column is not None]


def _key(name: str, source: Judged | Accuracy) -> str:
    return f"accuracy.{name}.prompts" if isinstance(source, Accuracy) else f"{name}.prompts"
