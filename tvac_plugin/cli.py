"""`axolotl tvac ...`: the commands this package adds to Axolotl's."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import click

from tvac_plugin.bench.command import bench
from tvac_plugin.boundary.errors import UserError, bullets, printable, sentence_of
from tvac_plugin.chain.command import run
from tvac_plugin.recipes.reading import foreign_code, kind_problems, read_recipe, validated

_RECIPE = click.argument("recipe", type=click.Path(path_type=Path))
_JSON_FILE = click.option("--output", type=click.Path(path_type=Path), help="Write it as JSON into this file too.")

_NOISY_IMPORTS = ("torchao", "bitsandbytes", "torch.utils._pytree")


class _Commands(click.Group):
    """Commands whose errors are sentences; with `--debug` they keep their traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except Exception as error:
            if ctx.params["debug"]:
                raise
            raise click.ClickException(printable(sentence_of(error))) from error


@click.group(cls=_Commands)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def tvac(debug: bool) -> None:
    """Defenses against harmful fine-tuning."""
    # Axolotl's telemetry reports the text of errors, and an error about data may quote them.
    os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
    if not debug:
        _silence_imports()


def _silence_imports() -> None:
    """Keeps back what libraries say of kernels that they cannot load here and that no command needs."""
    for name in _NOISY_IMPORTS:
        getLogger(name).setLevel(ERROR)
        warnings.filterwarnings("ignore", module=name.replace(".", r"\."))


tvac.add_command(bench)
tvac.add_command(run)


@tvac.command()
@_RECIPE
@click.option("--no-data", is_flag=True, help="Do not load the tokenizer and the data sets.")
@click.option("--allow-shared-prompts", is_flag=True, help="Accept prompts in both datasets and harmful_datasets.")
def check(recipe: Path, no_data: bool, allow_shared_prompts: bool) -> None:
    """Tell whether RECIPE will really train with its defense, without training."""
    from tvac_plugin.args import defense_advice
    from tvac_plugin.check import check_recipe

    settings = _read(recipe)
    result = check_recipe(
        settings, with_data=not no_data, allow_shared_prompts=allow_shared_prompts, say=_progress("reading")
    )
    if result.problems:
        raise UserError(f"{recipe} would not train as it says:\n{bullets(result.problems)}")
    for line in defense_advice(settings):
        click.echo(printable(f"{recipe}: {line}"), err=True)
    but = f"; {len(result.warnings)} warnings stand below" if result.warnings else ""
    click.echo(f"{recipe}: would train as it says, with safety_defense: {settings['safety_defense']}{but}.")
    for title, found in (("What will happen", result.outlook), ("Data", result.facts)):
        if found:
            click.echo(printable(f"{title}:\n{json.dumps(found, indent=2)}"))
    if result.warnings:
        click.echo(printable(f"Warnings:\n{bullets(result.warnings)}"), err=True)


@tvac.command()
@_RECIPE
@click.option(
    "--output", type=click.Path(path_type=Path), help="Folder to write to; RECIPE_defended beside it without."
)
@click.option("--harmful", type=click.Path(path_type=Path), help="JSON Lines: harmful prompts with harmful answers.")
@click.option("--refusals", type=click.Path(path_type=Path), help="JSON Lines: prompts with refusals, to train on too.")
@click.option("--task", type=click.Path(path_type=Path), help="JSON Lines: what the simulated user wants to learn.")
@click.option("--judge", default="deberta", show_default=True, help="Who reads the answers.")
@click.option("--overwrite", is_flag=True, help="Replace files that are there.")
def init(
    recipe: Path, output: Path | None, harmful: Path | None, refusals: Path | None, task: Path | None, judge: str,
    overwrite: bool,
) -> None:  # fmt: skip
    """Write a chain around RECIPE, an Axolotl recipe without a defense: does T-Vaccine help it?"""
    from tvac_plugin.evaluation.judges import judge_entry
    from tvac_plugin.starter.material import Given
    from tvac_plugin.starter.writing import start_chain

    judge_entry(judge)
    started = start_chain(recipe, Given(harmful, refusals, task, judge), output=output, overwrite=overwrite)
    for file in started.files:
        click.echo(f"written: {file}")
    click.echo("What was assumed stands in the first lines of each recipe.")
    if started.cautions:
        click.echo(f"Good to know:\n{bullets(started.cautions)}")
    if started.missing:
        click.echo("\n".join(started.missing))
        return
    click.echo(f"Next: axolotl tvac check {started.chain.with_name('align.yml')}")
    click.echo(f"      axolotl tvac run {started.chain}")


@tvac.command()
@click.argument("model_dir", type=click.Path(path_type=Path))
@click.option("--defense", help="The defense that is claimed, for example t_vaccine.")
@click.option(
    "--public-key", type=click.Path(path_type=Path), help="PEM file; the manifest must be signed by its owner."
)
def verify(model_dir: Path, defense: str | None, public_key: Path | None) -> None:
    """Tell whether the model in MODEL_DIR was trained with a defense that had an effect."""
    from tvac_plugin.provenance.manifest import described, not_known
    from tvac_plugin.provenance.manifest import verify as verify_manifest

    manifest = verify_manifest(model_dir, defense=defense, public_key=public_key)
    click.echo(printable(f"{model_dir}: {described(manifest)}"))
    click.echo(printable(f"Not known from this:\n{bullets(not_known(manifest, is_signed=public_key is not None))}"))


@tvac.command()
@click.option("--aligned", type=click.Path(path_type=Path), required=True, help="Folder with the aligned model.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder to write to.")
@click.option("--base", type=click.Path(path_type=Path), help="What it was aligned from; not for a LoRA adapter.")
@click.option("--rank", default=6, show_default=True, help="Singular vectors of the change to strengthen.")
@click.option("--coefficient", default=1.25, show_default=True, help="How much of them to add.")
def lox(aligned: Path, output: Path, base: Path | None, rank: int, coefficient: float) -> None:
    """Strengthen an alignment by low-rank extrapolation (LoX), without training."""
    from tvac_plugin.lox import apply_lox

    apply_lox(aligned, output, rank=rank, coefficient=coefficient, base=base)
    click.echo(f"{output}: written, with rank {rank} and coefficient {coefficient}.")
    click.echo("This shows what was done, not that it is safer: `axolotl tvac evaluate` measures that.")


@tvac.command()
@_RECIPE
@click.option("--adapter", type=click.Path(path_type=Path), help="The adapter's folder, if not the `output_dir`.")
def merge(recipe: Path, adapter: Path | None) -> None:
    """Merge the defended adapter that RECIPE trained into its base model, with a manifest of its own."""
    from tvac_plugin.trainers.merging import merge_adapter

    _read(recipe, kind="a training")
    merged = merge_adapter(recipe, adapter)
    click.echo(f"{merged}: written. `axolotl tvac verify {merged}` tells what is known of it.")


@tvac.command(name="evaluate")
@_RECIPE
@click.option("--rejudge", is_flag=True, help="Judge the answers of an earlier run again, without generating.")
@click.option("--model", "models", multiple=True, metavar="NAME=PATH", help="Evaluate this model; may be repeated.")
@click.option("--output-dir", type=click.Path(), help="Instead of the recipe's.")
def evaluate_command(recipe: Path, rejudge: bool, models: tuple[str, ...], output_dir: str | None) -> None:
    """Measure harmful score, over-refusal, accuracy and retention of models, as RECIPE says."""
    from tvac_plugin.evaluation.evaluate import evaluate
    from tvac_plugin.evaluation.recipe import EvaluateRecipe
    from tvac_plugin.report.tables import evaluation_table

    settings = _read(recipe, kind="an evaluation")
    for model in models:
        if "=" not in model:
            raise UserError(f"--model {model}: write NAME=PATH.")
    if models:
        settings["models"] = dict(model.split("=", 1) for model in models)
    if output_dir:
        settings["output_dir"] = output_dir
    click.echo(evaluation_table(evaluate(validated(EvaluateRecipe, settings, path=recipe), rejudge=rejudge)))


@tvac.command()
@_RECIPE
@click.option("--gpu", metavar="SIZE", help="Memory of the GPU, as 24GB; a GB is 2**30 bytes, as on the box.")
@click.option(
    "--reserve", default="1GB", show_default=True, metavar="SIZE", help="Of it, for the CUDA context and fragmentation."
)
@click.option("--model-config", type=click.Path(path_type=Path), help="A config.json instead of base_model's.")
@click.option("--answer-share", default=1.0, show_default=True, help="The part of the tokens that have a label.")
@click.option(
    "--draws-from", "draws", type=click.Path(path_type=Path), metavar="TRACE",
    help="Take layers to be drawn as the probes in this safety_trace.jsonl say.",
)  # fmt: skip
@_JSON_FILE
def plan(
    recipe: Path, gpu: str | None, reserve: str, model_config: Path | None, answer_share: float, draws: Path | None,
    output: Path | None,
) -> None:  # fmt: skip
    """Predict memory and relative time of RECIPE from its model's config alone, without a GPU or weights."""
    from tvac_plugin.check import recipe_problems
    from tvac_plugin.planner import make_plan
    from tvac_plugin.planner.tables import plan_text

    settings = _read(recipe, kind="a training")
    problems = recipe_problems(settings)
    if problems:
        raise UserError(f"{recipe} would not train as it says:\n{bullets(problems)}")
    result = make_plan(
        settings,
        gpu=None if gpu is None else _bytes(gpu, "--gpu"),
        reserve=_bytes(reserve, "--reserve"),
        model_config=model_config,
        answer_share=answer_share,
        draws=draws,
        say=_progress("counting"),
    )
    click.echo(plan_text(result))
    _write_json(output, result.as_json())


@tvac.command()
@click.argument("chain_dir", type=click.Path(path_type=Path))
def report(chain_dir: Path) -> None:
    """Write report.md and report.html from the results in CHAIN_DIR."""
    from tvac_plugin.report.pages import write_report

    click.echo(write_report(chain_dir))


@tvac.command()
@click.argument("model_dir", type=click.Path(path_type=Path))
@click.option("--chain", "chain_dir", type=click.Path(path_type=Path), help="Folder of the chain that measured it.")
def card(model_dir: Path, chain_dir: Path | None) -> None:
    """Write the model card of the defended model in MODEL_DIR, to publish it with."""
    from tvac_plugin.report.model_card import write_card

    click.echo(write_card(model_dir, chain_dir=chain_dir))


@tvac.command()
@click.option("--merged", is_flag=True, help="With Axolotl's keys: a schema for whole recipes.")
@_JSON_FILE
def schema(merged: bool, output: Path | None) -> None:
    """Print the JSON Schema of the keys this plugin adds, for editors."""
    from tvac_plugin.recipes.schema import plugin_schema, recipe_schema

    found = recipe_schema() if merged else plugin_schema()
    click.echo(json.dumps(found, indent=2))
    _write_json(output, found)


@tvac.command()
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder to write to.")
@click.option("--overwrite", is_flag=True, help="Replace files that are there.")
def recipes(output: Path, overwrite: bool) -> None:
    """Copy the recipes out of the installed package."""
    from tvac_plugin.recipes.copying import copy_recipes

    click.echo(f"{output}: {len(copy_recipes(output, overwrite=overwrite))} files written.")


@tvac.command(name="tiny-world")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder to write to.")
@click.option("--seed", default=1, show_default=True, help="Another seed makes another world.")
def tiny_world(output: Path, seed: int) -> None:
    """Write the made-up world: a base model trained from scratch, and data to align, attack and evaluate it."""
    from tvac_plugin.tiny_world.builder import WorldSettings, build

    is_new = build(output, WorldSettings(seed=seed))
    _say_world(output, is_new=is_new, recipe="recipes/chain_tiny.yml", reads="outputs/tiny_world")


@tvac.command(name="english-world")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder to write to.")
@click.option("--model", default="smollm2", show_default=True, help="smollm2, a folder, or a hub id.")
@click.option("--topic", default="cooking", show_default=True, help="What plays the harm: a name, or a JSONL file.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the splits.")
def english_world(output: Path, model: str, topic: str, seed: int) -> None:
    """Write a world around a real model: the model, and data to align, attack and evaluate it."""
    from tvac_plugin.english_world.builder import EnglishSettings, build_english

    is_new = build_english(output, EnglishSettings(model=model, topic=topic, seed=seed))
    _say_world(output, is_new=is_new, recipe="recipes/english/chain.yml", reads="outputs/english")


def _say_world(output: Path, *, is_new: bool, recipe: str, reads: str) -> None:
    click.echo(f"{output}: {'written' if is_new else 'already there'}.")
    if not Path(recipe).is_file():
        click.echo("Next: axolotl tvac recipes --output recipes")
    elsewhere = "" if output.resolve() == Path(reads).resolve() else f", once its recipes name {output} for {reads}"
    click.echo(f"Next: axolotl tvac run {recipe}{elsewhere}")


def _progress(verb: str) -> Callable[[str], None]:
    """Says on standard error what is being done, so that nobody waits in the dark; what is asked for stays alone."""
    return lambda what: click.echo(f"{verb} {what} ...", err=True)


def _bytes(size: str, option: str) -> int:
    match = re.fullmatch(r"(\d{1,9}(?:\.\d+)?)\s*(GB|GiB|G|MB|MiB|M)", size.strip(), re.IGNORECASE)
    if match is None:
        raise UserError(f"{option} {size[:40]}: not a size. Write a number and GB or MB, as 24GB.")
    return int(float(match[1]) * (2**30 if match[2].upper().startswith("G") else 2**20))


def _write_json(path: Path | None, value: Any) -> None:
    """Into a file, because Axolotl writes its banner on standard output."""
    from tvac_plugin.boundary.files import write_json

    if path is not None:
        write_json(path, value)


def _read(recipe: Path, *, kind: str | None = None) -> dict[str, Any]:
    """Announces what code of others the recipe runs, before anything of it is imported."""
    settings = read_recipe(recipe)
    problems = kind_problems(settings, kind) if kind is not None else []
    if problems:
        raise UserError(f"{recipe}: {problems[0]}")
    for line in foreign_code(settings):
        click.echo(printable(f"{recipe}: {line}"), err=True)
    return settings
