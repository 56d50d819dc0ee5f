"""report.md and report.html, written from results.json alone."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup

from tvac_plugin.report.charts import Series, heat_map, line_chart
from tvac_plugin.report.tables import (
    header,
    label,
    measure_names,
    model_label,
    model_rows,
    sentences,
    single_runs,
    spread,
)

RESULTS_FILE = "results.json"
_MARKUP = re.compile(r"[\\`*\[\]|>#~]")
INTERVALS = (
    "Rates in percent with 95 % intervals: Wilson's over prompts for one run; for several seeds the wider of Student's "
    "over seeds and the mean of the runs' own."
)


class ReportError(ValueError):
    """There is nothing to report."""


def write_report(chain_dir: Path) -> Path:
    """Writes both pages beside the results; returns the path of report.html.

    Raises:
        ReportError: There are no readable results in the folder.
    """
    path = chain_dir / RESULTS_FILE
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        pages = {"report.md": markdown(results), "report.html": html(results)}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ReportError(f"{path}: no readable results here. Name the `output_dir` of `axolotl tvac run`.") from error
    for name, text in pages.items():
        (chain_dir / name).write_text(text, encoding="utf-8", errors="replace")
    return chain_dir / "report.html"


def markdown(results: Mapping[str, Any]) -> str:
    """The table and the sentences as Markdown; names and errors in them are shown as they are."""
    measures = measure_names(results)
    lines = ["# Report", "", *_table(results["summary"], measures), "", INTERVALS, ""]
    lines += [f"- {_plain(sentence)}" for sentence in [*sentences(results), *_judges(results)]]
    runs = single_runs(results)
    if runs:
        lines += ["", "## Every run", "", *_table(runs, measures)]
    return "\n".join(lines) + "\n"


def _table(entries: Sequence[Mapping[str, Any]], measures: Sequence[str]) -> list[str]:
    head = header(measures)
    rows = [_line(row) for row in model_rows(entries, measures)]
    return [_line(head), f"|{'---|' * len(head)}", *rows]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_plain(text) for text in cells)} |"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line: no markup, no HTML, no link, no further cell."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(text.split())).replace("&", "&amp;").replace("<", "&lt;")


def html(results: Mapping[str, Any]) -> str:
    """One page that needs nothing else; every text from a model or a recipe is escaped."""
    environment = Environment(
        loader=PackageLoader("tvac_plugin.report", "."), autoescape=select_autoescape(default=True)
    )
    return environment.get_template("page.html.j2").render(
        results=results,
        measures=measure_names(results),
        spread=spread,
        label=label,
        model_label=model_label,
        runs=single_runs(results),
        intervals=INTERVALS,
        sentences=[*sentences(results), *_judges(results)],
        # Charts escape what they show: see `charts.py`.
        charts=[(title, Markup(chart)) for title, chart in _charts(results) if chart],  # noqa: S704
        recipes={job: json.dumps(facts["recipe"], indent=2) for job, facts in results["jobs"].items()},
    )


def _charts(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    finished = [found for found in results["cells"] if found["status"] == "finished"]
    unit = "harmful score, percent"
    curves = line_chart(_curves(finished), x_label="attack steps", y_label=unit, y_max=100)
    ratios = line_chart(_against_ratio(results), x_label="share of harmful rows", y_label=unit, y_max=100)
    charts = [
        ("Harmful score against attack steps", curves),
        ("Harmful score after the attack against the share of harmful rows", ratios),
    ]
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


def _curves(finished: Sequence[Mapping[str, Any]]) -> list[Series]:
    """One line per group of cells that differ in the seed alone: a run's interval, or the seeds' mean and extremes."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for found in finished:
        params = {key: value for key, value in found["params"].items() if key != "seed"}
        groups.setdefault(label({**found, "params": params}), []).append(found)
    return [_curve(name, members) for name, members in groups.items()]


def _curve(name: str, members: Sequence[Mapping[str, Any]]) -> Series:
    runs = [{p["step"]: p["harmful_score"] for p in found["curve"] if "harmful_score" in p} for found in members]
    steps = [step for step in runs[0] if all(step in run for run in runs)]
    points = [(step, *_mean_rate([run[step] for run in runs])) for step in steps]
    return Series(name, points, " ".join(sorted({_basis(run[step]) for run in runs for step in steps})))


def _mean_rate(rates: Sequence[Mapping[str, Any]]) -> tuple[float, float, float]:
    if len(rates) == 1:
        return rates[0]["percent"], rates[0]["low"], rates[0]["high"]
    values = [rate["percent"] for rate in rates]
    return fmean(values), min(values), max(values)


def _against_ratio(results: Mapping[str, Any]) -> list[Series]:
    groups: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for entry in results["summary"]:
        params = dict(entry["params"])
        ratio = params.pop("harmful_ratio", None)
        attacked = list(entry["models"].values())[-1:] if ratio is not None else []
        for measures in attacked:
            if "harmful_score" in measures:
                groups.setdefault(label({**entry, "params": params}), []).append((ratio, measures["harmful_score"]))
    return [
        Series(name, [(r, m["percent"], m["low"], m["high"]) for r, m in sorted(points, key=lambda p: p[0])],
               _basis(points[0][1]))
        for name, points in groups.items()
    ]  # fmt: skip


def _basis(rate: Mapping[str, Any]) -> str:
    return f"{rate['judge']} {rate.get('prompts_sha256')}"


def _judges(results: Mapping[str, Any]) -> list[str]:
    notes = {
        f"{measure.replace('_', ' ')}: judged by {rate['judge']}. {rate.get('judge_note', '')}".strip()
        for entry in results["summary"]
        for found in entry["models"].values()
        for measure, rate in found.items()
    }
    return sorted(notes)
