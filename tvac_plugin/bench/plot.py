"""Results of a benchmark as one page with charts that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable

from markupsafe import Markup

from tvac_plugin.bench.cases import OFF, PLAIN
from tvac_plugin.bench.results import CaseResult, Results, Run
from tvac_plugin.bench.tables import SIZES, bench_text, describe, runs_of
from tvac_plugin.report.charts import Series, bar_chart, line_chart
from tvac_plugin.report.pages import rendered

PAGE_FILE = "bench.html"


def bench_page(results: Results) -> str:
    """Bars of all cases, and lines that show how cost grows if that was measured."""
    return rendered(
        "bench.html.j2",
        text=bench_text(results),
        lead=describe(results),
        charts=[(title, Markup(chart)) for title, chart in _charts(results)],  # noqa: S704 - drawn and escaped in charts
    )


def _charts(results: Results) -> list[tuple[str, str]]:
    measures: dict[str, Callable[[CaseResult, CaseResult], float]] = {
        "saved activations": lambda case, sft: case.mean("saved_bytes") / sft.mean("saved_bytes"),
        "FLOPs": lambda case, sft: case.mean("flops") / sft.mean("flops"),
    }
    if results.settings.repeats:
        measures = {"time": lambda case, _sft: case.time_ratio or math.nan, **measures}
    main = results.main.cases
    bars = {name: [measure(case, main[PLAIN]) for measure in measures.values()] for name, case in main.items()}
    charts = [("One step, SFT is 1", bar_chart(bars, series=list(measures)))]
    for size, words in SIZES.items():
        runs = sorted(runs_of(results, size), key=lambda run: int(getattr(run.shape, size)))
        for title, measure in measures.items() if runs else ():
            lines = [
                Series(name, [_point(run, size, name, measure) for run in runs], title)
                for name in main
                if name not in (PLAIN, OFF)
            ]
            charts.append((f"{title} against {words}", line_chart(lines, x_label=words, y_label=f"{title} x SFT")))
    return charts


def _point(
    run: Run, size: str, name: str, measure: Callable[[CaseResult, CaseResult], float]
) -> tuple[float, float, None, None]:
    return getattr(run.shape, size), measure(run.cases[name], run.cases[PLAIN]), None, None
