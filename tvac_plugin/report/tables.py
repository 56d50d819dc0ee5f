"""Results as plain text tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


def evaluation_table(results: Mapping[str, Any]) -> str:
    """One line per model, one column per measure, each rate with its interval and counts."""
    measures = list(next(iter(results["models"].values())))
    rows = [[name, *(cell(found[measure]) for measure in measures)] for name, found in results["models"].items()]
    notes = {f"{m}: judged by {found[m]['judge']}" for found in results["models"].values() for m in measures}
    table = text_table(["model", *(f"{measure.replace('_', ' ')} %" for measure in measures)], rows)
    return table + "\n\n" + "\n".join(sorted(notes))


def cell(rate: Mapping[str, Any]) -> str:
    """A rate with its interval and counts in the space of a table's cell."""
    unscored = f", {rate['num_unscored']} unscored" if rate["num_unscored"] else ""
    return f"{rate['percent']:.1f} ({rate['low']:.1f} to {rate['high']:.1f}, n = {rate['num_scored']}{unscored})"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def chain_table(results: Mapping[str, Any]) -> str:
    """One line per group of cells and model, with what differs and what failed below."""
    rows, measures = [], measure_names(results)
    for entry in results["summary"]:
        for name, found in entry["models"].items():
            rows.append([label(entry["params"]), name, *(cell(found[m]) if m in found else "" for m in measures)])
    header = ["run", "model", *(f"{measure.replace('_', ' ')} %" for measure in measures)]
    return "\n".join([text_table(header, rows), "", *sentences(results)])


def label(params: Mapping[str, Any]) -> str:
    """A group of cells in words."""
    return ", ".join(f"{key} {value}" for key, value in params.items()) or "all"


def sentences(results: Mapping[str, Any]) -> list[str]:
    """What the numbers say and do not say, in words."""
    lines = []
    for entry in results["summary"]:
        for name, measures in reversed(entry["against_none"].items()):
            for measure, change in measures.items():
                lines.append(_difference(label(entry["params"]), name, measure, change))
        threshold = results["asked"]["attack_threshold"]
        costs = ["not within the attack" if cost is None else f"after {cost} steps" for cost in entry["attack_cost"]]
        if costs and any(cell["curve"] for cell in results["cells"]):
            lines.append(f"{label(entry['params'])}: harmful score above {threshold:g} %: {', '.join(costs)}.")
    for name, facts in results["jobs"].items():
        drawn = Counter(layer for event in facts.get("trace") or [] for layer in event.get("layers", ()))
        if drawn:
            counts = ", ".join(f"{layer}: {count}" for layer, count in sorted(drawn.items()))
            lines.append(f"{name}: layers drawn, times: {counts}.")
    for found in results["cells"]:
        lines += [f"{label(found['params'])}: FAILED. {problem}" for problem in found["problems"]]
    return lines


def _difference(run: str, model: str, measure: str, change: Mapping[str, Any]) -> str:
    what = f"{run}, {model}, {measure.replace('_', ' ')}: {change['points']:+.1f} points against no defense"
    interval = f"95 % {change['low']:+.1f} to {change['high']:+.1f}"
    return f"{what} ({interval}){', within the noise' if change['within_noise'] else ''}."


def measure_names(results: Mapping[str, Any]) -> list[str]:
    """All measures of a chain, in the order of its evaluation."""
    names: dict[str, None] = {}
    for entry in results["summary"]:
        for found in entry["models"].values():
            names |= dict.fromkeys(found)
    return list(names)
