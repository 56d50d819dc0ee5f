"""A chain spread out into jobs: what is run, in which folder, after what, and what it shares between cells."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.boundary.paths import folder_name
from tvac_plugin.boundary.secrets import has_secrets, without_secrets
from tvac_plugin.chain.cells import Cell, cells
from tvac_plugin.chain.recipe import BASE, Chain, LoxConfig, Stage, applies, with_matrix_value
from tvac_plugin.configs.base import DATA_KEYS

JobKind = Literal["train", "lox", "merge", "evaluate"]
PREPARED_FOLDER = "prepared"
"""Where a job keeps its tokenized data: not shared, for Axolotl finds them by path and settings, not by content."""


def launcher() -> str:
    """What starts a training: `accelerate` for several GPUs, else Axolotl's own process, which imports things once."""
    return "accelerate" if torch.cuda.device_count() > 1 else "python"


@dataclass(frozen=True)
class Job:
    """One subprocess of a chain.

    Attributes:
        id: Stage with the values of the cell's keys that it depends on.
        kind: What it does.
        stage: The stage it belongs to.
        subject: For evaluations, the stage whose model is read, or `base`.
        parents: Ids of the jobs whose output it needs.
        folder: Its folder; the output is in `out/`.
        recipe: Its resolved recipe; for a `lox` job, what the command is given.
        command: What is run, without a shell; every value of a recipe in it is behind its own `--key=`.
    """

    id: str
    kind: JobKind
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

    def write_recipe(self) -> None:
        """Writes the resolved recipe; with a secret in it, the folder and its logs are for their owner only."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.recipe_file.unlink(missing_ok=True)
        is_private = has_secrets(self.recipe)
        if is_private:
            self.folder.chmod(0o700)
        file = os.open(self.recipe_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if is_private else 0o666)
        with os.fdopen(file, "w", encoding="utf-8") as stream:
            yaml.safe_dump(self.recipe, stream, sort_keys=False)


class ChainPlan:
    """All jobs of a chain in an order that can be run, and which of them make up each cell."""

    def __init__(self, chain: Chain) -> None:
        """Spreads the chain out; nothing is written.

        Raises:
            UserError: Two different jobs would have one folder.
            pydantic.ValidationError: A `lox:` stage is given what it does not know.
        """
        self.chain = chain
        self.root = Path(chain.recipe.output_dir).resolve()
        self.jobs: dict[str, Job] = {}
        self.cells: list[tuple[Cell, dict[str, str]]] = [(cell, self._cell_jobs(cell)) for cell in cells(chain.recipe)]

    def training(self, job: Job) -> Job:
        """The training job whose weights a `train` or `lox` job has, or extrapolates."""
        while job.kind != "train":
            job = self.jobs[job.parents[0]]
        return job

    def _cell_jobs(self, cell: Cell) -> dict[str, str]:
        """Adds the jobs of one cell; returns their ids by stage, or by stage and subject for evaluations."""
        ids: dict[str, str] = {}
        for stage in self.chain.recipe.stages:
            if stage.evaluate is None:
                ids[stage.name] = self._model(stage.name, cell).id
            else:
                for subject in stage.models:
                    ids[f"{stage.name}.{subject}"] = self._evaluate(stage, subject, cell).id
        return ids

    def _model(self, name: str, cell: Cell) -> Job:
        """The job that makes the model of a stage; of a skipped one, that of the stage before it."""
        stage = self._stand_in(name, cell)
        return self._train(stage, cell) if stage.train is not None else self._lox(stage, cell)

    def _stand_in(self, name: str, cell: Cell) -> Stage:
        stage = self.chain.stage(name)
        while self._is_skipped(stage, cell):
            stage = self.chain.stage(str(stage.model_from))
        return stage

    def _is_skipped(self, stage: Stage, cell: Cell) -> bool:
        return stage.lox is not None and self._lox_config(stage, cell).coefficient == 0

    def _resolved(self, stage: Stage, cell: Cell) -> dict[str, Any]:
        recipe = self.chain.recipes[stage.name]
        for key, value in cell.items():
            if applies(key, stage, recipe):
                recipe = with_matrix_value(recipe, key, value)
        return dict(recipe)

    def _lox_config(self, stage: Stage, cell: Cell) -> LoxConfig:
        return LoxConfig.model_validate(self._resolved(stage, cell))

    def _train(self, stage: Stage, cell: Cell) -> Job:
        recipe = self._resolved(stage, cell)
        parents: tuple[str, ...] = ()
        if stage.model_from is not None:
            source = self._model(stage.model_from, cell)
            parents, recipe["base_model"] = self._merged(source)
            if "simulated_user" in recipe:
                recipe["simulated_user"] = _protected(recipe["simulated_user"], self.training(source).recipe)
        job_id = self._id(stage.name, cell, self._keys_behind(stage, cell))
        folder = self.root / "jobs" / job_id
        recipe |= {"output_dir": str(folder / "out"), "dataset_prepared_path": str(folder / PREPARED_FOLDER)}
        return self._add(Job(
            job_id, "train", stage.name, None, parents, folder, recipe,
            ("axolotl", "train", str(folder / "recipe.yml"), f"--launcher={launcher()}"),
        ))  # fmt: skip

    def _lox(self, stage: Stage, cell: Cell) -> Job:
        config = self._lox_config(stage, cell)
        source = self._model(str(stage.model_from), cell)
        trained = self.training(source).recipe
        job_id = self._id(stage.name, cell, self._keys_behind(stage, cell))
        folder = self.root / "jobs" / job_id
        base = {} if trained.get("adapter") else {"base": str(trained["base_model"])}
        options = {"aligned": str(source.output), "output": str(folder / "out"), **config.model_dump(), **base}
        arguments = [f"--{key}={value}" for key, value in options.items()]
        return self._add(Job(
            job_id, "lox", stage.name, None, (source.id,), folder, options, ("tvac", "lox", *arguments),
        ))  # fmt: skip

    def _merged(self, source: Job) -> tuple[tuple[str, ...], str]:
        """The merged model of a training or `lox` job, and the jobs to wait for."""
        training = self.training(source).recipe
        if not training.get("adapter"):
            return (source.id,), str(source.output)
        job_id = f"{source.id}.merged"
        folder = self.root / "jobs" / job_id
        recipe = without_secrets(training) | {"output_dir": str(folder / "out")}
        merge = self._add(Job(
            job_id, "merge", source.stage, None, (source.id,), folder, recipe,
            ("axolotl", "merge-lora", str(folder / "recipe.yml"), f"--lora-model-dir={source.output}"),
        ))  # fmt: skip
        return (merge.id,), str(merge.output / "merged")

    def _evaluate(self, stage: Stage, subject: str, cell: Cell) -> Job:
        recipe = self._resolved(stage, cell)
        keys = self._keys_behind(stage, cell)
        parents: tuple[str, ...] = ()
        first = self._first(subject)
        if subject == BASE:
            models = {BASE: str(self._resolved(first, cell)["base_model"])}
            keys |= {f"{first.name}.base_model"}
        else:
            made = self._model(subject, cell)
            subject = made.stage
            keys |= self._keys_behind(self.chain.stage(subject), cell)
            parents, models = (made.id,), {subject: str(made.output)}
            if stage.checkpoints and "simulated_user" in made.recipe:
                recipe["checkpoints_of"] = str(made.output)
            recipe |= _asked_as_trained(recipe, made.recipe)
        if isinstance(recipe.get("retention"), Mapping) and recipe["retention"].get("of") is None:
            recipe["retention"] = {**recipe["retention"], "of": str(self._resolved(first, cell)["base_model"])}
        job_id = self._id(f"{stage.name}.{subject}", cell, keys)
        folder = self.root / "jobs" / job_id
        recipe |= {"models": models, "output_dir": str(folder / "out")}
        return self._add(Job(
            job_id, "evaluate", stage.name, subject, parents, folder, recipe,
            ("tvac", "evaluate", str(folder / "recipe.yml")),
        ))  # fmt: skip

    def _first(self, subject: str) -> Stage:
        """The stage whose recipe names the model that a subject goes back to."""
        stages = self.chain.recipe.stages
        stage = next(stage for stage in stages if (stage.train if subject == BASE else stage.name == subject))
        while stage.model_from is not None:
            stage = self.chain.stage(stage.model_from)
        return stage

    def _keys_behind(self, stage: Stage, cell: Cell) -> set[str]:
        """The keys of a cell that decide what comes out of a stage, those of the stages before it included."""
        recipe = self.chain.recipes[stage.name]
        if not self._is_skipped(stage, cell):
            keys = {key for key in cell if applies(key, stage, recipe)}
        else:
            keys = set() if recipe["coefficient"] == 0 else {f"{stage.name}.coefficient"}
        return keys if stage.model_from is None else keys | self._keys_behind(self.chain.stage(stage.model_from), cell)

    def _id(self, name: str, cell: Cell, keys: set[str]) -> str:
        used = [f"{key}={value}" for key, value in cell.items() if key in keys]
        return folder_name("-".join([name, *used]))

    def _add(self, job: Job) -> Job:
        known = self.jobs.setdefault(job.id, job)
        if known != job:
            raise UserError(
                f"{job.id}: two different jobs would have this folder. Write the values of arms and matrix so that "
                "they differ in more than `/`, spaces or quotes."
            )
        return known


def _asked_as_trained(evaluation: Mapping[str, Any], training: Mapping[str, Any]) -> dict[str, Any]:
    """The harmful measure of an attacked model, with the attack's way of asking unless it has its own."""
    asked, user = evaluation.get("harmful_score"), training.get("simulated_user")
    if not (isinstance(asked, Mapping) and isinstance(user, Mapping)) or "prompt_transform" in asked:
        return {}
    transform = user.get("prompt_transform")
    return {} if transform is None else {"harmful_score": {**asked, "prompt_transform": transform}}


def is_defended(recipe: Mapping[str, Any]) -> bool:
    """Whether a training recipe claims a defense."""
    return recipe.get("safety_defense") not in (None, "none")


def _protected(user: Mapping[str, Any], alignment: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the alignment's data to what the user's prompts must not be in."""
    entries = list(user.get("disjoint_from") or [])
    for entry in (entry for key in ("datasets", *DATA_KEYS) for entry in alignment.get(key) or []):
        if entry not in entries:
            entries.append(entry)
    return dict(user) | {"disjoint_from": entries}
