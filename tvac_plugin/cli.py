"""`axolotl tvac ...`: the commands this package adds to Axolotl's."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import click

from tvac_plugin.bench.command import bench
from tvac_plugin.recipe import RecipeError, foreign_code, kind_problems, read_recipe

_RECIPE = click.argument("recipe", type=click.Path(path_type=Path))
_JSON_FILE = click.option("--output", type=click.Path(path_type=Path), help="Write it as JSON into this file too.")


@click.group()
def tvac() -> None:
    """Defenses against harmful fine-tuning."""
    # Axolotl's telemetry reports the text of errors, and an error about data may quote them.
    os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")


tvac.add_command(bench)


@tvac.command()
@_RECIPE
@click.option("--no-data", is_flag=True, help="Do not load the tokenizer and the data sets.")
@click.option("--allow-shared-prompts", is_flag=True, help="Accept prompts in both datasets and harmful_datasets.")
def check(recipe: Path, no_data: bool, allow_shared_prompts: bool) -> None:
    """Tell whether RECIPE will really train with its defense, without training."""
    from tvac_plugin.check import check_recipe

    settings = _read(recipe)
    for line in foreign_code(settings):
        click.echo(f"{recipe}: {line}", err=True)
    result = check_recipe(settings, with_data=not no_data, allow_shared_prompts=allow_shared_prompts)
    if result.problems:
        lines = "\n".join(f"- {problem}" for problem in result.problems)
        raise click.ClickException(f"{recipe} would not train as it says:\n{lines}")
    click.echo(f"{recipe}: would train as it says, with safety_defense: {settings['safety_defense']}.")
    if result.facts:
        click.echo(json.dumps(result.facts, indent=2))


@tvac.command()
@click.argument("model_dir", type=click.Path(path_type=Path))
@click.option("--defense", help="The defense that is claimed, for example t_vaccine.")
def verify(model_dir: Path, defense: str | None) -> None:
    """Tell whether the weights in MODEL_DIR were trained with a defense."""
    from tvac_plugin.provenance import ProvenanceError
    from tvac_plugin.provenance import verify as verify_manifest

    try:
        manifest = verify_manifest(model_dir, defense=defense)
    except ProvenanceError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{model_dir}: {manifest['defense']}, {manifest['defended_steps']} defended steps.")
    click.echo("This shows how it was trained, not that it is safe: `axolotl tvac evaluate` measures that.")


@tvac.command()
@click.option("--aligned", type=click.Path(path_type=Path), required=True, help="Folder with the aligned model.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder to write to.")
@click.option("--base", type=click.Path(path_type=Path), help="What it was aligned from; not for a LoRA adapter.")
@click.option("--rank", default=6, show_default=True, help="Singular vectors of the change to strengthen.")
@click.option("--coefficient", default=1.25, show_default=True, help="How much of them to add.")
def lox(aligned: Path, output: Path, base: Path | None, rank: int, coefficient: float) -> None:
    """Strengthen an alignment by low-rank extrapolation (LoX), without training."""
    from tvac_plugin.lox import LoxError, apply_lox

    try:
        apply_lox(aligned, output, rank=rank, coefficient=coefficient, base=base)
    except (LoxError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{output}: written, with rank {rank} and coefficient {coefficient}.")
    click.echo("This shows what was done, not that it is safer: `axolotl tvac evaluate` measures that.")


@tvac.command(name="evaluate")
@_RECIPE
@click.option("--rejudge", is_flag=True, help="Judge the answers of an earlier run again, without generating.")
@click.option("--model", "models", multiple=True, metavar="NAME=PATH", help="Evaluate this model; may be repeated.")
@click.option("--output-dir", type=click.Path(), help="Instead of the recipe's.")
def evaluate_command(recipe: Path, rejudge: bool, models: tuple[str, ...], output_dir: str | None) -> None:
    """Measure harmful score, over-refusal and accuracy of models, as RECIPE says."""
    from pydantic import ValidationError

    from tvac_plugin.evaluation.evaluate import evaluate
    from tvac_plugin.evaluation.recipe import EvaluateRecipe
    from tvac_plugin.messages import explain
    from tvac_plugin.report.tables import evaluation_table

    settings = _read(recipe, kind="an evaluation")
    for model in models:
        if "=" not in model:
            raise click.ClickException(f"--model {model}: write NAME=PATH.")
    if models:
        settings["models"] = dict(model.split("=", 1) for model in models)
    if output_dir:
        settings["output_dir"] = output_dir
    try:
        results = evaluate(EvaluateRecipe.model_validate(settings), rejudge=rejudge)
    except ValidationError as error:
        raise click.ClickException(f"{recipe}:\n" + "\n".join(f"- {line}" for line in explain(error))) from error
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(evaluation_table(results))


@tvac.command()
@_RECIPE
@click.option("--dry-run", is_flag=True, help="Write the resolved recipes and print the commands, but run nothing.")
@click.option("--set", "overrides", multiple=True, metavar="STAGE.KEY=VALUE", help="Change a key of a stage's recipe.")
@click.option(
    "--jobs", "num_parallel", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
    help="Run up to N jobs at a time. Each job uses all visible GPUs, so this is for CPUs: with a GPU leave it at 1.",
)  # fmt: skip
def run(recipe: Path, dry_run: bool, overrides: tuple[str, ...], num_parallel: int) -> None:
    """Run the chain in RECIPE: alignment, attack, evaluation, report. Run it again to continue."""
    from pydantic import ValidationError

    from tvac_plugin.chain.jobs import Plan
    from tvac_plugin.chain.preflight import plan_problems
    from tvac_plugin.chain.recipe import read_chain
    from tvac_plugin.chain.results import collect
    from tvac_plugin.chain.runner import ChainBusyError, run_plan
    from tvac_plugin.messages import explain
    from tvac_plugin.report.pages import write_report
    from tvac_plugin.report.tables import chain_table

    _read(recipe, kind="a chain")
    try:
        plan = Plan(read_chain(recipe, overrides))
    except (RecipeError, ValidationError) as error:
        raise click.ClickException(f"{recipe}:\n" + "\n".join(f"- {line}" for line in explain(error))) from error
    problems = plan_problems(plan)
    if problems:
        raise click.ClickException(f"{recipe} cannot run:\n" + "\n".join(f"- {line}" for line in problems))
    try:
        if dry_run:
            for job in plan.jobs.values():
                job.write_recipe()
                click.echo(shlex.join(job.command))
            return
        results = collect(plan, run_plan(plan, say=click.echo, num_parallel=num_parallel))
        page = write_report(plan.root)
    except (ChainBusyError, OSError) as error:
        raise click.ClickException(f"{error}. Mend that and run the same command again.") from error
    click.echo("\n" + chain_table(results))
    click.echo(f"\nreport: {page}")
    if any(cell["status"] != "finished" for cell in results["cells"]):
        raise click.ClickException("some cells failed; the table says why. Mend that and run the same command again.")


@tvac.command()
@_RECIPE
@click.option("--gpu", metavar="SIZE", help="Memory of the GPU, as 24GB; a GB is 2**30 bytes, as on the box.")
@click.option(
    "--reserve", default="1GB", show_default=True, metavar="SIZE", help="Of it, for the CUDA context and fragmentation."
)
@click.option("--model-config", type=click.Path(path_type=Path), help="A config.json instead of base_model's.")
@click.option("--answer-share", default=1.0, show_default=True, help="The part of the tokens that have a label.")
@_JSON_FILE
def plan(
    recipe: Path, gpu: str | None, reserve: str, model_config: Path | None, answer_share: float, output: Path | None
) -> None:
    """Predict memory and relative time of RECIPE from its model's config alone, without a GPU or weights."""
    from tvac_plugin.check import recipe_problems
    from tvac_plugin.planner import make_plan
    from tvac_plugin.planner.tables import plan_text

    settings = _read(recipe, kind="training")
    problems = recipe_problems(settings)
    if problems:
        raise click.ClickException(f"{recipe} would not train as it says:\n" + "\n".join(f"- {p}" for p in problems))
    try:
        result = make_plan(
            settings,
            gpu=None if gpu is None else _bytes(gpu, "--gpu"),
            reserve=_bytes(reserve, "--reserve"),
            model_config=model_config,
            answer_share=answer_share,
        )
    except ValueError as error:
        raise click.ClickException(f"{recipe}: {error}") from error
    click.echo(plan_text(result))
    _write_json(output, result.as_json())


@tvac.command()
@click.argument("chain_dir", type=click.Path(path_type=Path))
def report(chain_dir: Path) -> None:
    """Write report.md and report.html from the results in CHAIN_DIR."""
    from tvac_plugin.report.pages import ReportError, write_report

    try:
        click.echo(write_report(chain_dir))
    except ReportError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{error}. Mend that and run the same command again.") from error


@tvac.command()
@_JSON_FILE
def schema(output: Path | None) -> None:
    """Print the JSON Schema of the keys this plugin adds, for editors."""
    from tvac_plugin.args import SafetyDefenseArgs

    found = SafetyDefenseArgs.model_json_schema()
    click.echo(json.dumps(found, indent=2))
    _write_json(output, found)


@tvac.command(name="tiny-world")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder to write to.")
@click.option("--seed", default=1, show_default=True, help="Another seed makes another world.")
def tiny_world(output: Path, seed: int) -> None:
    """Write the made-up world: a base model trained from scratch, and data to align, attack and evaluate it."""
    from tvac_plugin.tiny_world.builder import WorldError, WorldSettings, build

    try:
        is_new = build(output, WorldSettings(seed=seed))
    except WorldError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{error}. Mend that or name another --output.") from error
    click.echo(f"{output}: {'written' if is_new else 'already there'}.")


def _bytes(size: str, option: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB|G|MB|MiB|M)", size.strip(), re.IGNORECASE)
    if match is None:
        raise click.ClickException(f"{option} {size}: not a size. Write a number and GB or MB, as 24GB.")
    return int(float(match[1]) * (2**30 if match[2].upper().startswith("G") else 2**20))


def _write_json(path: Path | None, value: Any) -> None:
    """Into a file, because Axolotl writes its banner on standard output."""
    from tvac_plugin.files import write_json

    if path is None:
        return
    try:
        write_json(path, value)
    except OSError as error:
        raise click.ClickException(f"--output {path}: {error.strerror}.") from error


def _read(recipe: Path, *, kind: str | None = None) -> dict[str, Any]:
    try:
        settings = read_recipe(recipe)
    except RecipeError as error:
        raise click.ClickException(str(error)) from error
    problems = kind_problems(settings, kind) if kind is not None else []
    if problems:
        raise click.ClickException(f"{recipe}: {problems[0]}")
    return settings
