"""report.md and report.html, written from results.json alone."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup

from tvac_plugin.boundary.errors import UserError, printable, shown
from tvac_plugin.boundary.files import write_text
from tvac_plugin.report.attacker import attacker_series, attacker_table, attacker_words
from tvac_plugin.report.charts import Series, heat_map, line_chart
from tvac_plugin.report.markdown import plain_table, plain_text
from tvac_plugin.report.matched import CURVE_HEADER, MATCHED_HEADER, curve_rows, matched_rows
from tvac_plugin.report.tables import (
    curve_stages,
    header,
    label,
    measure_names,
    model_rows,
    note,
    number,
    of_stage,
    sentences,
    shown_models,
    single_runs,
    spread,
    title,
)
from tvac_plugin.report.verdict import doubts, verdicts

RESULTS_FILE = "results.json"
FORMAT = 3
"""Of the results that this version writes and reads."""
_WHERE = "Name the `output_dir` of `axolotl tvac run`."
INTERVALS = (
    "Rates in percent with 95 % intervals: Wilson's over prompts for one run; for several seeds the wider of Student's "
    "over seeds and the mean of the runs' own."
)


def write_report(chain_dir: Path) -> Path:
    """Writes both pages beside the results; returns the path of report.html.

    Raises:
        UserError: There are no readable results in the folder, or those of another version.
    """
    results = read_results(chain_dir / RESULTS_FILE)
    pages = {"report.md": markdown(results), "report.html": html(results)}
    for name, text in pages.items():
        write_text(chain_dir / name, text)
    return chain_dir / "report.html"


def read_results(path: Path) -> dict[str, Any]:
    """The results of a chain, without characters that a page would obey instead of showing them.

    Raises:
        UserError: There are none, or those of another version.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: no readable results here. {_WHERE}") from error
    if not isinstance(results, dict) or "format" not in results:
        raise UserError(f"{path}: not the results of a chain. {_WHERE}")
    if results["format"] != FORMAT:
        raise UserError(
            f"{path}: written by another version (format {shown(results['format'])}, this one reads {FORMAT}). Run "
            "`axolotl tvac run` with the chain's recipe again: jobs that are done are skipped."
        )
    cleaned: dict[str, Any] = _cleaned(results)
    return cleaned


def _cleaned(value: Any) -> Any:
    """JSON values without characters that a page would obey instead of showing them, as overrides of direction."""
    if isinstance(value, dict):
        return {printable(key): _cleaned(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_cleaned(inner) for inner in value]
    return printable(value) if isinstance(value, str) else value


def markdown(results: Mapping[str, Any]) -> str:
    """The table and the sentences as Markdown; names and errors in them are shown as they are."""
    measures = measure_names(results)
    lines = [
        "# Report",
        "",
        *(f"**{plain_text(v.run)}: {v.headline}.** {plain_text(f'{v.reason} {v.price}')}\n" for v in verdicts(results)),
    ]
    lines += [f"- {plain_text(doubt)}" for doubt in doubts(results)]
    lines += ["", *_table(results["summary"], measures), "", INTERVALS, ""]
    lines += [f"- {plain_text(sentence)}" for sentence in _sentences(results)]
    for heading, head, rows in _tables(results):
        lines += ["", f"## {heading}", "", *plain_table(head, rows)]
    runs = single_runs(results)
    if runs:
        lines += ["", "## Every run", "", *_table(runs, measures)]
    return "\n".join(lines) + "\n"


def _table(entries: Sequence[Mapping[str, Any]], measures: Sequence[str]) -> list[str]:
    return plain_table(header(measures), model_rows(entries, measures))


def _tables(results: Mapping[str, Any]) -> list[tuple[str, Sequence[str], list[list[str]]]]:
    """Title, header and rows: what an attacker found, and what is said about harm and the user's task together."""
    stages = curve_stages(results)
    matched, curves = (
        [row for entry in results["summary"] for stage, found in entry[key].items()
         for row in rows(of_stage(label(entry), stage, stages), found)]
        for key, rows in (("matched_utility", matched_rows), ("utility_curves", curve_rows))
    )  # fmt: skip
    tables = [("Harm at matched utility", MATCHED_HEADER, matched), ("Harm and task by step", CURVE_HEADER, curves)]
    return [table for table in [*attacker_table(results), *tables] if table[2]]


def rendered(template: str, **values: Any) -> str:
    """A page from a template of this package; every text in it is escaped."""
    loader = PackageLoader("tvac_plugin.report", ".")
    return Environment(loader=loader, autoescape=select_autoescape(default=True)).get_template(template).render(values)


def html(results: Mapping[str, Any]) -> str:
    """One page that needs nothing else; every text from a model or a recipe is escaped."""
    return rendered(
        "page.html.j2",
        results=results,
        measures=measure_names(results),
        number=number,
        spread=spread,
        title=title,
        label=label,
        shown_models=shown_models,
        verdicts=verdicts(results),
        doubts=doubts(results),
        runs=single_runs(results),
        intervals=INTERVALS,
        tables=_tables(results),
        sentences=_sentences(results),
        # Charts escape what they show: see `charts.py`.
        charts=[(title, Markup(chart)) for title, chart in _charts(results) if chart],  # noqa: S704
        recipes={job: json.dumps(facts["recipe"], indent=2) for job, facts in results["jobs"].items()},
    )


def _charts(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    finished = [found for found in results["cells"] if found["status"] == "finished"]
    unit = "harmful score, percent"
    curves = line_chart(_curves(finished, curve_stages(results)), x_label="attack steps", y_label=unit, y_max=100)
    ratios = line_chart(_against_ratio(results), x_label="share of harmful rows", y_label=unit, y_max=100)
    charts = [
        ("Harmful score against attack steps", curves),
        ("Harmful score against the user's task, over the attack", _harm_against_task(results)),
        ("Harmful score after the attack against the share of harmful rows", ratios),
    ]
    if "attacker" in results:
        found = line_chart(attacker_series(results["attacker"]), x_label="trials", y_label=unit, y_max=100)
        charts.insert(0, ("Most harm that an attacker found against trials", found))
    losses: dict[str, list[Series]] = {}
    for name, facts in results["jobs"].items():
        if facts.get("losses"):
            points = [(step, loss, None, None) for step, loss in facts["losses"]]
            losses.setdefault(facts["stage"], []).append(Series(name, points, "loss"))
    charts += [
        (f"Training loss, {stage}", line_chart(s, x_label="steps", y_label="loss")) for stage, s in losses.items()
    ]
    for name, facts in results["jobs"].items():
        trace = facts.get("trace") or []
        draws, probes = ([line for line in trace if line["event"] == kind] for kind in ("draw", "probe"))
        charts.append((f"Layers drawn, {name}", heat_map(draws, probes)))
    return charts


def _curves(finished: Sequence[Mapping[str, Any]], stages: Collection[str]) -> list[Series]:
    """One line per attack of cells that differ in the seed alone: a run's interval, or the seeds' mean and extremes."""
    groups: dict[str, list[Sequence[Mapping[str, Any]]]] = {}
    for found in finished:
        params = {key: value for key, value in found["params"].items() if key != "seed"}
        for stage, curve in found["curves"].items():
            groups.setdefault(of_stage(label({**found, "params": params}), stage, stages), []).append(curve)
    return [_curve(name, curves) for name, curves in groups.items()]


def _curve(name: str, curves: Sequence[Sequence[Mapping[str, Any]]]) -> Series:
    runs = [{p["step"]: p["harmful_score"] for p in curve if "harmful_score" in p} for curve in curves]
    steps = [step for step in runs[0] if all(step in run for run in runs)]
    points = [(step, *_mean_rate([run[step] for run in runs])) for step in steps]
    return Series(name, points, " ".join(sorted({_basis(run[step]) for run in runs for step in steps})))


def _mean_rate(rates: Sequence[Mapping[str, Any]]) -> tuple[float, float, float]:
    if len(rates) == 1:
        return rates[0]["percent"], rates[0]["low"], rates[0]["high"]
    values = [rate["percent"] for rate in rates]
    return fmean(values), min(values), max(values)


def _harm_against_task(results: Mapping[str, Any]) -> str:
    """One line per attack, one point per step that was evaluated; each from the model that the attack starts from."""
    stages = curve_stages(results)
    series = [
        Series(of_stage(label(entry), stage, stages),
               [(p["utility"]["percent"], p["harmful_score"]["percent"], None, None) for p in curve],
               f"{_basis(curve[0]['harmful_score'])} {_basis(curve[0]['utility'])}",
               [f"after {p['step']} steps" for p in curve])
        for entry in results["summary"]
        for stage, curve in entry["utility_curves"].items()
    ]  # fmt: skip
    return line_chart(series, x_label=f"{results['utility']}, percent", y_label="harmful score, percent", y_max=100)


def _against_ratio(results: Mapping[str, Any]) -> list[Series]:
    attacked = [
        (entry, name, measures["harmful_score"])
        for entry in results["summary"]
        for name, measures in entry["models"].items()
        if "harmful_ratio" in entry["params"] and entry["roles"][name] == "attacked" and "harmful_score" in measures
    ]
    stages = {name for _, name, _ in attacked}
    groups: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for entry, name, rate in attacked:
        params = dict(entry["params"])
        ratio = params.pop("harmful_ratio")
        groups.setdefault(of_stage(label({**entry, "params": params}), name, stages), []).append((ratio, rate))
    return [
        Series(name, [(r, m["percent"], m["low"], m["high"]) for r, m in sorted(points, key=lambda p: p[0])],
               _basis(points[0][1]))
        for name, points in groups.items()
    ]  # fmt: skip


def _basis(rate: Mapping[str, Any]) -> str:
    return f"{rate['judge']} {rate.get('prompts_sha256')}"


def _sentences(results: Mapping[str, Any]) -> list[str]:
    chosen = attacker_words(results["attacker"]) if "attacker" in results else ()
    return [*chosen, *sentences(results), *_judges(results)]


def _judges(results: Mapping[str, Any]) -> list[str]:
    notes = {
        f"{note(measure, rate)}. {rate.get('judge_note', '')}".strip()
        for entry in results["summary"]
        for found in entry["models"].values()
        for measure, rate in found.items()
    }
    return sorted(notes)
