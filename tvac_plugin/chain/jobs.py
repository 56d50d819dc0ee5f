"""A chain spread out into jobs: what is run, in which folder, after what, and what it shares between cells."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from tvac_plugin.chain.recipe import BASE, Chain, Stage, applies, with_matrix_value

Kind = Literal["train", "merge", "evaluate"]
Cell = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One subprocess of a chain.

    Attributes:
        id: Stage with the values of the matrix it depends on.
        kind: What it does.
        stage: The stage it belongs to.
        subject: For evaluations, the stage whose model is read, or `base`.
        parents: Ids of the jobs whose output it needs.
        folder: Its folder; the output is in `out/`.
        recipe: Its resolved recipe.
        command: What is run.
    """

    id: str
    kind: Kind
    stage: str
    subject: str | None
    parents: tuple[str, ...]
    folder: Path
    recipe: dict[str, Any]
    command: tuple[str, ...]

    @property
    def output(self) -> Path:
        """Where the job's results are."""
        return self.folder / "out"

    @property
    def recipe_file(self) -> Path:
        """The resolved recipe on disk; it can be run by hand."""
        return self.folder / "recipe.yml"

    def recipe_text(self) -> str:
        """The resolved recipe as YAML."""
        return yaml.safe_dump(self.recipe, sort_keys=False)


class Plan:
    """All jobs of a chain in an order that can be run, and which of them make up each cell of the matrix."""

    def __init__(self, chain: Chain) -> None:
        """Spreads the chain out; nothing is written."""
        self.chain = chain
        self.root = Path(chain.recipe.output_dir).resolve()
        self.jobs: dict[str, Job] = {}
        self.cells: list[tuple[Cell, dict[str, str]]] = [
            (cell, self._cell_jobs(cell)) for cell in _cells(chain.recipe.matrix)
        ]

    def _cell_jobs(self, cell: Cell) -> dict[str, str]:
        """Adds the jobs of one cell; returns their ids by stage, or by stage and subject for evaluations."""
        ids: dict[str, str] = {}
        for stage in self.chain.recipe.stages:
            if stage.train is not None:
                ids[stage.name] = self._train(stage, cell).id
            else:
                for subject in stage.models:
                    ids[f"{stage.name}.{subject}"] = self._evaluate(stage, subject, cell).id
        return ids

    def _train(self, stage: Stage, cell: Cell) -> Job:
        recipe = self.chain.recipes[stage.name]
        parents: tuple[str, ...] = ()
        for key in cell:
            if applies(key, stage, recipe):
                recipe = with_matrix_value(recipe, key, cell[key])
        recipe = dict(recipe)
        if stage.model_from is not None:
            source = self._train(self.chain.stage(stage.model_from), cell)
            parents, recipe["base_model"] = self._model_of(source)
            if "simulated_user" in recipe:
                recipe["simulated_user"] = _protected(recipe["simulated_user"], source.recipe)
        job_id = self._id(stage.name, cell, self._stages_behind(stage))
        folder = self.root / "jobs" / job_id
        recipe |= {"output_dir": str(folder / "out"), "dataset_prepared_path": str(self.root / "prepared")}
        return self._add(Job(
            job_id, "train", stage.name, None, parents, folder, recipe,
            ("axolotl", "train", str(folder / "recipe.yml")),
        ))  # fmt: skip

    def _model_of(self, source: Job) -> tuple[tuple[str, ...], str]:
        """The merged model of a training job, and the jobs to wait for."""
        if not source.recipe.get("adapter"):
            return (source.id,), str(source.output)
        job_id = f"{source.id}.merged"
        folder = self.root / "jobs" / job_id
        recipe = source.recipe | {"output_dir": str(folder / "out")}
        merge = self._add(Job(
            job_id, "merge", source.stage, None, (source.id,), folder, recipe,
            ("axolotl", "merge-lora", str(folder / "recipe.yml"), "--lora-model-dir", str(source.output)),
        ))  # fmt: skip
        return (merge.id,), str(merge.output / "merged")

    def _evaluate(self, stage: Stage, subject: str, cell: Cell) -> Job:
        recipe = dict(self.chain.recipes[stage.name])
        if subject == BASE:
            first = next(stage for stage in self.chain.recipe.stages if stage.train is not None)
            behind: list[Stage] = []
            parents: tuple[str, ...] = ()
            models = {BASE: str(self.chain.recipes[first.name]["base_model"])}
        else:
            trained = self._train(self.chain.stage(subject), cell)
            behind = self._stages_behind(self.chain.stage(subject))
            parents, models = (trained.id,), {subject: str(trained.output)}
            if stage.checkpoints and "simulated_user" in trained.recipe:
                recipe["checkpoints_of"] = str(trained.output)
        job_id = self._id(f"{stage.name}.{subject}", cell, behind)
        folder = self.root / "jobs" / job_id
        recipe |= {"models": models, "output_dir": str(folder / "out")}
        return self._add(Job(
            job_id, "evaluate", stage.name, subject, parents, folder, recipe,
            ("axolotl", "tvac", "evaluate", str(folder / "recipe.yml")),
        ))  # fmt: skip

    def _stages_behind(self, stage: Stage) -> list[Stage]:
        before = [] if stage.model_from is None else self._stages_behind(self.chain.stage(stage.model_from))
        return [*before, stage]

    def _id(self, name: str, cell: Cell, stages: list[Stage]) -> str:
        used = [
            f"{key}={cell[key]}"
            for key in cell
            if any(applies(key, stage, self.chain.recipes[stage.name]) for stage in stages)
        ]
        return "-".join([name, *used]).replace("/", "_").replace(" ", "")

    def _add(self, job: Job) -> Job:
        return self.jobs.setdefault(job.id, job)


def is_defended(recipe: Mapping[str, Any]) -> bool:
    """Whether a training recipe claims a defense."""
    return recipe.get("safety_defense") not in (None, "none")


def _protected(user: Mapping[str, Any], alignment: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the alignment's data to what the user's prompts must not be in."""
    entries = list(user.get("disjoint_from") or [])
    for entry in [*(alignment.get("datasets") or []), *(alignment.get("harmful_datasets") or [])]:
        if entry not in entries:
            entries.append(entry)
    return dict(user) | {"disjoint_from": entries}


def _cells(matrix: Mapping[str, list[Any]]) -> Iterator[Cell]:
    for values in itertools.product(*matrix.values()):
        yield dict(zip(matrix, values, strict=True))
