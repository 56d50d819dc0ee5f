"""What the four recipes are made from: the user's recipe, its data divided, and the rows that come beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tvac_plugin.boundary.errors import UserError, bullets
from tvac_plugin.check import missing_model
from tvac_plugin.configs.refusals import conflicts
from tvac_plugin.evaluation.judges.rules import refuses
from tvac_plugin.planner.model_config import load_model_config
from tvac_plugin.recipes.reading import kind_problems, read_recipe
from tvac_plugin.starter.division import MOST_ASKED, Division, divide
from tvac_plugin.starter.rows import Row, RowFormat, read_rows, row_format, unique

FEWEST_HARMFUL = 8
MOST_PROBED, MOST_HARMFUL_ASKED = 200, 500
_SHORT_ANSWER = 5
"""Words up to which an answer is one of a few that can be right or wrong."""


@dataclass(frozen=True)
class Given:
    """What the user gives beside the recipe.

    Attributes:
        harmful: File of harmful prompts with harmful answers.
        refusals: File of harmful prompts with refusals, to train on with the data of the recipe.
        task: File of what the simulated user wants to learn; a part of the recipe's data without.
        judge: Who reads the answers.
    """

    harmful: Path | None = None
    refusals: Path | None = None
    task: Path | None = None
    judge: str = "deberta"


@dataclass
class Material:
    """Rows that share no question, and what is known of the recipe.

    Attributes:
        recipe: The user's, as plain data.
        form: How its rows are read.
        divisions: Its `datasets:`, in three parts each.
        asked: Benign rows to ask; empty where the data could not be read here.
        probe: Harmful rows that the defense reads.
        attack: Harmful rows of the simulated user.
        harmful_asked: Harmful rows to ask.
        refusals: Rows to train on beside the recipe's.
        task: The simulated user's benign rows; empty where they are a part of `datasets:`.
        task_asked: Of its kind, to ask; those of `asked` where they are a part of `datasets:`.
        num_layers: Of the model; `None` where its config is not on this machine.
    """

    recipe: dict[str, Any]
    form: RowFormat
    divisions: list[Division]
    asked: list[Row] = field(default_factory=list)
    probe: list[Row] = field(default_factory=list)
    attack: list[Row] = field(default_factory=list)
    harmful_asked: list[Row] = field(default_factory=list)
    refusals: list[Row] = field(default_factory=list)
    task: list[Row] = field(default_factory=list)
    task_asked: list[Row] = field(default_factory=list)
    num_layers: int | None = None

    @property
    def num_task_rows(self) -> int | None:
        """Benign rows that the simulated user can have; `None` where that is not known."""
        if self.task:
            return len(self.task)
        counts = [len(division.rows[1]) for division in self.divisions if division.rows is not None]
        return sum(counts) if len(counts) == len(self.divisions) else None

    @property
    def has_short_answers(self) -> bool:
        """Whether the task's answers can be compared word for word."""
        return bool(self.task_asked) and all(len(row.answer.split()) <= _SHORT_ANSWER for row in self.task_asked)


def gather(path: Path, given: Given) -> Material:
    """Reads a recipe and all that its chain needs.

    Raises:
        UserError: The recipe cannot be defended as it is, or rows are missing; lists all reasons.
    """
    recipe = read_recipe(path)
    problems = kind_problems(recipe, "a training") + _recipe_problems(recipe) + missing_model(recipe)
    entries = recipe.get("datasets") if isinstance(recipe.get("datasets"), list) else []
    forms: set[RowFormat] = set()
    divisions: list[Division] = []
    for number, entry in enumerate(entries or []):
        where = f"datasets[{number}]"
        try:
            forms.add(row_format(entry, where=where))
            divisions.append(divide(entry, where=where, with_task=given.task is None))
        except UserError as error:
            problems.append(str(error))
    if len(forms) > 1:
        problems.append(
            "datasets: some are alpaca's and some chat_template, and rows are written in one form. Use one."
        )
    files: dict[str, list[Row]] = {}
    for option in ("harmful", "refusals", "task"):
        file = getattr(given, option)
        try:
            files[option] = [] if file is None else read_rows(file, option=f"--{option}")
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError(f"{path}: no chain can be made from it:\n{bullets(problems)}")
    material = Material(recipe, forms.pop(), divisions, num_layers=_num_layers(recipe))
    _share_out(material, given, files)
    return material


def _recipe_problems(recipe: Mapping[str, Any]) -> list[str]:
    if recipe.get("safety_defense") is not None or recipe.get("simulated_user") is not None:
        return ["it asks for a defense or is an attack already. Give the recipe without `safety_defense:`."]
    datasets = recipe.get("datasets")
    is_list = isinstance(datasets, list) and datasets and all(isinstance(entry, dict) for entry in datasets)
    missing = [] if is_list else ["`datasets:` names no data. Add entries with `path:` and `type:`."]
    if not isinstance(recipe.get("plugins") or [], list):
        missing.append("`plugins:` must be a list. Write one.")
    return conflicts(recipe) + missing


def _num_layers(recipe: Mapping[str, Any]) -> int | None:
    try:
        return int(load_model_config(recipe).get_text_config().num_hidden_layers)
    except (UserError, AttributeError):
        return None


def _share_out(material: Material, given: Given, files: Mapping[str, Sequence[Row]]) -> None:
    """Gives every question to one of training, probe, attack and evaluation."""
    known = [division.rows for division in material.divisions if division.rows is not None]
    trained, held = ([row for rows in known for row in rows[part]] for part in (0, 1))
    asked = [row for rows in known for row in rows[2] if not refuses(row.answer)]
    material.asked = unique(asked, without=[*trained, *held])
    material.task_asked = material.asked
    if given.task is not None:
        rows = unique(files["task"], without=[*trained, *material.asked])
        num_asked = min(MOST_ASKED, max(1, len(rows) // 5))
        material.task_asked, material.task = rows[:num_asked], rows[num_asked:]
        _need(material.task, 10, f"--task {given.task}", len(files["task"]))
    benign = [*trained, *held, *material.asked, *files["task"]]
    refusals, harmful = _apart(unique(files["refusals"], without=benign), unique(files["harmful"], without=benign))
    material.refusals = refusals
    if given.refusals is not None:
        _need(refusals, 1, f"--refusals {given.refusals}", len(files["refusals"]))
    if given.harmful is not None:
        _need(harmful, FEWEST_HARMFUL, f"--harmful {given.harmful}", len(files["harmful"]))
        num_probed, num_asked = min(MOST_PROBED, len(harmful) // 4), min(MOST_HARMFUL_ASKED, len(harmful) // 4)
        material.probe, material.harmful_asked = harmful[:num_probed], harmful[num_probed : num_probed + num_asked]
        material.attack = harmful[num_probed + num_asked :]


def _apart(refusals: list[Row], harmful: list[Row]) -> tuple[list[Row], list[Row]]:
    """Of questions that are refused in one file and answered in the other, half are kept in each."""
    both = sorted({row.question for row in refusals} & {row.question for row in harmful})
    refused = set(both[::2])
    return (
        [row for row in refusals if row.question in refused or row.question not in both],
        [row for row in harmful if row.question not in refused],
    )


def _need(rows: Sequence[Row], fewest: int, what: str, num_given: int) -> None:
    if len(rows) < fewest:
        raise UserError(
            f"{what}: {len(rows)} of {num_given} rows ask something that no other file asks, and {fewest} are needed. "
            "Give more rows."
        )
