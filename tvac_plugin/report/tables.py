"""Results as plain text tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tvac_plugin.names import printable


def evaluation_table(results: Mapping[str, Any]) -> str:
    """One line per model, one column per measure, each rate with its interval and counts."""
    measures = list(next(iter(results["models"].values())))
    rows = [[name, *(cell(found[measure]) for measure in measures)] for name, found in results["models"].items()]
    notes = {f"{m}: judged by {found[m]['judge']}" for found in results["models"].values() for m in measures}
    table = text_table(["model", *(f"{measure.replace('_', ' ')} %" for measure in measures)], rows)
    return printable(table + "\n\n" + "\n".join(sorted(notes)))


def cell(rate: Mapping[str, Any]) -> str:
    """A rate with its spread in the space of a table's cell."""
    return f"{rate['percent']:.1f} ({spread(rate)})"


def spread(rate: Mapping[str, Any]) -> str:
    """How sure a rate is: its 95 % interval and counts, and over several seeds the least and the largest."""
    interval = f"{rate['low']:.1f} to {rate['high']:.1f}"
    if "min" in rate:
        extremes = f"min {rate['min']:.1f}, max {rate['max']:.1f} of {rate['num_seeds']} seeds"
        interval = f"{extremes}; 95 % {interval}"
    unscored = f", {rate['num_unscored']} unscored" if rate["num_unscored"] else ""
    return f"{interval}, n = {rate['num_scored']}{unscored}"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def chain_table(results: Mapping[str, Any]) -> str:
    """One line per group of cells and model, with what differs and what failed below."""
    measures = measure_names(results)
    rows = model_rows(results["summary"], measures)
    return printable("\n".join([text_table(header(measures), rows), "", *sentences(results)]))


def header(measures: Sequence[str]) -> list[str]:
    """The titles of the columns of `model_rows`."""
    return ["run", "model", *(f"{measure.replace('_', ' ')} %" for measure in measures)]


def model_rows(entries: Sequence[Mapping[str, Any]], measures: Sequence[str]) -> list[list[str]]:
    """One row per model of groups of cells, or of single cells."""
    return [
        [label(entry), model_label(entry, name), *(cell(found[m]) if m in found else "" for m in measures)]
        for entry in entries
        for name, found in entry["models"].items()
    ]


def single_runs(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The finished cells, if a summary takes some of them together."""
    has_seeds = any(entry["num_finished"] > 1 for entry in results["summary"])
    return [found for found in results["cells"] if has_seeds and found["status"] == "finished"]


def label(entry: Mapping[str, Any]) -> str:
    """A cell, or a group of cells, in words: its arm as `t_vaccine + stage.key=1`, then its other keys."""
    params = entry["params"]
    arm = [key for key in entry.get("arm", ()) if key in params]
    arm_words = [f"{params[key]}" if key == "safety_defense" else f"{key}={params[key]}" for key in arm]
    others = [f"{key} {value}" for key, value in params.items() if key not in arm]
    return ", ".join(filter(None, [" + ".join(arm_words), *others])) or "all"


def model_label(entry: Mapping[str, Any], name: str) -> str:
    """A model's name, and whose weights it has if its stage was skipped."""
    stand_in = entry.get("skipped", {}).get(name)
    return name if stand_in is None else f"{name} (skipped: {stand_in})"


def sentences(results: Mapping[str, Any]) -> list[str]:
    """What the numbers say and do not say, in words."""
    lines = []
    for entry in results["summary"]:
        for name, measures in reversed(entry["against_none"].items()):
            for measure, change in measures.items():
                lines.append(_difference(label(entry), name, measure, change))
        threshold = results["asked"]["attack_threshold"]
        costs = ["not within the attack" if cost is None else f"after {cost} steps" for cost in entry["attack_cost"]]
        if costs and any(cell["curve"] for cell in results["cells"]):
            lines.append(f"{label(entry)}: harmful score above {threshold:g} %: {', '.join(costs)}.")
    for name, facts in results["jobs"].items():
        drawn = Counter(layer for event in facts.get("trace") or [] for layer in event.get("layers", ()))
        if drawn:
            counts = ", ".join(f"{layer}: {count}" for layer, count in sorted(drawn.items()))
            lines.append(f"{name}: layers drawn, times: {counts}.")
    for found in results["cells"]:
        lines += [f"{label(found)}: FAILED. {problem}" for problem in found["problems"]]
    return lines


def _difference(run: str, model: str, measure: str, change: Mapping[str, Any]) -> str:
    what = f"{run}, {model}, {measure.replace('_', ' ')}: {change['points']:+.1f} points against no defense"
    interval = f"95 % {change['low']:+.1f} to {change['high']:+.1f}"
    if "num_seeds" in change:
        extremes = f"{change['min']:+.1f} to {change['max']:+.1f}"
        interval = f"mean of the differences of {change['num_seeds']} seeds, {extremes}; {interval}"
    return f"{what} ({interval}){', within the noise' if change['within_noise'] else ''}."


def measure_names(results: Mapping[str, Any]) -> list[str]:
    """All measures of a chain, in the order of its evaluation."""
    names: dict[str, None] = {}
    for entry in results["summary"]:
        for found in entry["models"].values():
            names |= dict.fromkeys(found)
    return list(names)
