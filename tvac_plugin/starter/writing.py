"""The files of `axolotl tvac init`: all of them or none."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tvac_plugin.boundary.files import write_all
from tvac_plugin.starter.asking import chain_text, evaluate_text
from tvac_plugin.starter.draft import ALIGN, ATTACK, CHAIN, EVALUATE, Draft
from tvac_plugin.starter.material import Given, gather
from tvac_plugin.starter.rows import evaluation_text, training_text
from tvac_plugin.starter.training import align_text, attack_cautions, attack_text


class Started(NamedTuple):
    """What was written.

    Attributes:
        files: In their order.
        chain: The one to run.
        missing: What it still needs, one sentence each.
        cautions: What to know before it is run, one sentence each.
    """

    files: list[Path]
    chain: Path
    missing: list[str]
    cautions: list[str]


def start_chain(recipe: Path, given: Given, *, output: Path | None = None, overwrite: bool = False) -> Started:
    """Writes the recipes and the data of a chain around a recipe.

    Args:
        recipe: An Axolotl recipe without a defense.
        given: What else there is.
        output: The folder; `<recipe>_defended` beside the recipe without.
        overwrite: Whether files that are there may be replaced.

    Raises:
        UserError: The recipe cannot be defended, rows are missing, or a file is there already; nothing is written.
    """
    folder = recipe.with_name(f"{recipe.stem}_defended") if output is None else output
    draft = Draft(gather(recipe, given), recipe, _as_named(folder), given.judge)
    files = _files(draft)
    write_all(folder, files, overwrite=overwrite)
    return Started(
        [folder / name for name in files], folder / CHAIN, draft.missing(), draft.cautions() + attack_cautions(draft)
    )


def _files(draft: Draft) -> dict[str, str]:
    """All files by their path in the folder."""
    rows, form = draft.material, draft.material.form
    data = {
        "harmful_probe": training_text(rows.probe, form),
        "harmful_attack": training_text(rows.attack, form),
        "eval_harmful": evaluation_text(rows.harmful_asked, form, harmful=True),
        "refusals": training_text(rows.refusals, form),
        "task": training_text(rows.task, form),
        "eval_benign": evaluation_text(rows.asked, form),
        "eval_task": evaluation_text(rows.task_asked if rows.task else [], form),
    }
    recipes = {
        ALIGN: align_text(draft),
        ATTACK: attack_text(draft),
        EVALUATE: evaluate_text(draft),
        CHAIN: chain_text(draft),
    }
    return recipes | {f"data/{name}.jsonl": text for name, text in data.items() if text}


def _as_named(folder: Path) -> Path:
    """As recipes are to name it: from where one starts, if it lies below."""
    here, there = Path.cwd(), folder.resolve()
    return there.relative_to(here.resolve()) if there.is_relative_to(here.resolve()) else there
