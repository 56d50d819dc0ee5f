"""`axolotl tvac bench`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import click

from tvac_plugin.bench import DEFAULT_SEED
from tvac_plugin.boundary.errors import UserError, bullets

if TYPE_CHECKING:
    from tvac_plugin.bench.results import Results
    from tvac_plugin.bench.settings import Settings
    from tvac_plugin.bench.shape import Shape

Command = Callable[..., Any]
_FILE = click.Path(path_type=Path, dir_okay=False)
_FOLDER = click.Path(path_type=Path, file_okay=False)
_COUNTS = (
    ("--layers", "num_layers", 16, "Decoder layers."),
    ("--width", "hidden_size", 512, "Hidden size."),
    ("--sequence", "sequence_len", 128, "Tokens of a row."),
    ("--batch", "batch_size", 4, "Rows of a batch."),
    ("--drawn-layers", "num_active_layers", 4, "Layers that T-Vaccine and OASIS draw."),
    ("--vocabulary", "vocabulary_size", 32_000, "Tokens that there are."),
    ("--threads", "threads", 2, "CPU threads."),
    ("--draws", "draws", 8, "Layer sets that they are averaged over."),
)
_CHOICES = (
    ("--attention", "attention", ["eager", "sdpa"], "Attention of transformers."),
    ("--loss-type", "loss_type", ["nll", "chunked_nll"], "SFTConfig's; Axolotl trains with nll."),
    ("--dtype", "dtype", ["float32", "bfloat16"], "Of all weights."),
    ("--device", "device", ["cpu", "cuda"], "Where to measure."),
)


def _shape_options(command: Command) -> Command:
    options: dict[str, Any]
    for flag, name, choices, text in reversed(_CHOICES):
        options = {"type": click.Choice(choices), "default": choices[0], "show_default": True, "help": text}
        command = click.option(flag, name, **options)(command)
    for flag, name, default, text in reversed(_COUNTS):
        options = {"type": click.IntRange(min=1), "default": default, "show_default": True, "help": text}
        command = click.option(flag, name, **options)(command)
    return command


@click.command()
@click.option("--defense", "defenses", multiple=True, metavar="NAME", help="Measure this; may be repeated.  [all]")
@_shape_options
@click.option(
    "--repeats", type=click.IntRange(min=0), default=5, show_default=True,
    help="Timed rounds; 0 counts without timing.",
)  # fmt: skip
@click.option("--warmup", type=click.IntRange(min=0), default=1, show_default=True, help="Rounds before them.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=DEFAULT_SEED, show_default=True, help="Of all that is random."
)
@click.option(
    "--metrics/--no-metrics", "host_metrics", default=True, show_default=True,
    help="Token accuracy and entropy of each training batch, which TRL computes by default and Axolotl does not.",
)  # fmt: skip
@click.option("--set", "changes", multiple=True, metavar="DEFENSE.KEY=VALUE", help="Change a defense's setting.")
@click.option(
    "--draws-from", "draws_from", type=_FILE, metavar="TRACE",
    help="Draw layers with the mean probabilities of the probes in this safety_trace.jsonl.",
)  # fmt: skip
@click.option("--scale", is_flag=True, help="Also vary layers, width, sequence and drawn layers, one at a time.")
@click.option("--output", type=_FOLDER, help="Write bench.json and bench.html into this folder.")
@click.option("--markdown", is_flag=True, help="Print the tables in Markdown.")
@click.option("--baseline", type=_FILE, help="Fail if something got worse than in this file.")
@click.option(
    "--tolerance", type=click.FloatRange(min=0), default=10.0, show_default=True, metavar="PERCENT",
    help="How much larger than the baseline's a time ratio may be; counts must be equal.",
)  # fmt: skip
@click.option("--write-baseline", type=_FILE, help="Write the results as a baseline.")
def bench(
    *, defenses: tuple[str, ...], changes: tuple[str, ...], scale: bool, output: Path | None, markdown: bool,
    baseline: Path | None, tolerance: float, write_baseline: Path | None, draws_from: Path | None, **options: Any,
) -> None:  # fmt: skip
    """Measure what a training step costs with each defense, next to plain SFT, on a random model."""
    from tvac_plugin.bench.baseline import regressions
    from tvac_plugin.bench.baseline import write_baseline as write
    from tvac_plugin.bench.results import read_results
    from tvac_plugin.bench.settings import Settings, parse_changes
    from tvac_plugin.bench.shape import Shape
    from tvac_plugin.bench.tables import bench_text

    shape = Shape.model_validate({key: options.pop(key) for key in Shape.model_fields if key in options})
    chosen = {"defenses": list(defenses)} if defenses else {}
    if draws_from is not None:
        options["probabilities"] = _probabilities(draws_from, shape, is_scaled=scale)
    settings = Settings.model_validate({**options, **chosen, "changes": parse_changes(changes)})
    earlier = None if baseline is None else read_results(baseline)
    _refuse_what_would_fail_later(shape, settings, earlier, [output, write_baseline and write_baseline.parent])
    results = _measured(shape, settings, scale=scale)
    click.echo(bench_text(results, markdown=markdown))
    if output is not None:
        _write(results, output)
    if write_baseline is not None:
        write(results, write_baseline)
        click.echo(f"baseline: {write_baseline}")
    worse = [] if earlier is None else regressions(results, earlier, tolerance_percent=tolerance)
    if worse:
        raise UserError(f"not as {baseline}:\n{bullets(worse)}")


def _refuse_what_would_fail_later(
    shape: Shape, settings: Settings, earlier: Results | None, folders: list[Path | None]
) -> None:
    from tvac_plugin.bench.baseline import comparison_problem
    from tvac_plugin.bench.settings import defense_settings

    for name in settings.defenses:
        config = defense_settings(name, shape, settings)
        if settings.probabilities is not None and getattr(config, "layer_sampling", "uniform") != "uniform":
            raise UserError(
                f"--draws-from: a probe of `{name}` would take the place of these probabilities. Leave out "
                f"`--set {name}.layer_sampling`."
            )
    problem = None if earlier is None else comparison_problem(earlier, shape, settings)
    if problem:
        raise UserError(f"nothing to compare with the baseline: {problem}")
    for folder in filter(None, folders):
        folder.mkdir(parents=True, exist_ok=True)


def _probabilities(trace: Path, shape: Shape, *, is_scaled: bool) -> list[float]:
    """The mean over probes; each of them decides about equally many draws."""
    from tvac_plugin.planner.draws import read_probes

    if is_scaled:
        raise UserError("--draws-from: holds for one number of layers, and --scale varies it. Leave one of them out.")
    probes = read_probes(trace, num_layers=shape.num_layers)
    return [fmean(layer) for layer in zip(*probes, strict=True)]


def _measured(shape: Shape, settings: Settings, *, scale: bool) -> Results:
    """The results; progress goes to standard error, and the libraries are kept quiet."""
    import datasets
    from transformers.utils import logging

    from tvac_plugin.bench.run import benchmark

    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    return benchmark(shape, settings, scale=scale, say=lambda text: click.echo(text, err=True))


def _write(results: Results, folder: Path) -> None:
    from tvac_plugin.bench.plot import PAGE_FILE, bench_page
    from tvac_plugin.bench.results import RESULTS_FILE
    from tvac_plugin.boundary.files import write_json, write_text

    write_json(folder / RESULTS_FILE, results.model_dump(mode="json"))
    write_text(folder / PAGE_FILE, bench_page(results))
    click.echo(f"results: {folder / RESULTS_FILE}, charts: {folder / PAGE_FILE}")
