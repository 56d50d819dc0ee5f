"""A chain's results on a terminal of 100 columns: the table, what differs, and the verdict last, where the eye is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any

from tvac_plugin.boundary.errors import printable
from tvac_plugin.report.attacker import attacker_words
from tvac_plugin.report.tables import counts, header, measure_names, number, sentences, shown_models, text_table
from tvac_plugin.report.verdict import doubts, verdicts

_WIDTH = 100
Models = Sequence[tuple[str, str, Mapping[str, Any]]]


def chain_table(results: Mapping[str, Any]) -> str:
    """One line per model, then in words how many answers that rests on, what differs, and what it comes to."""
    measures = measure_names(results)
    models = list(shown_models(results["summary"]))
    rows = [[run, name, *(_cell(found[m]) if m in found else "" for m in measures)] for run, name, found in models]
    parts = [
        [*_sizes(models), *sentences(results)],
        list(attacker_words(results["attacker"])) if "attacker" in results else [],
        [verdict.words() for verdict in verdicts(results)],
        [f"Read with care. {doubt}" for doubt in doubts(results)],
    ]
    words = ["\n".join(_folded(line) for line in lines) for lines in parts if lines]
    return printable("\n\n".join([text_table(header(measures), rows), *words]))


def _folded(line: str) -> str:
    return "\n".join(wrap(line, _WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))


def _cell(rate: Mapping[str, Any]) -> str:
    digits = 3 if "ratio" in rate else 1
    return f"{number(rate)} ({rate['low']:.{digits}f}-{rate['high']:.{digits}f})"


def _sizes(models: Models) -> list[str]:
    """How many answers each measure read, and of which models some could not be scored or were neither."""
    sizes: dict[str, set[int]] = {}
    lines = []
    for run, name, found in models:
        for measure, rate in found.items():
            sizes.setdefault(measure, set()).add(rate["num_rows" if "ratio" in rate else "num_scored"])
            if rate.get("num_neither") or rate.get("num_unscored"):
                model = ", ".join(filter(None, [run, name, measure.replace("_", " ")]))
                lines.append(f"{model}: n = {counts(rate)}.")
    told = [f"{measure.replace('_', ' ')} {' or '.join(map(str, sorted(n)))}" for measure, n in sizes.items()]
    seeds = max((rate.get("num_seeds", 1) for _, _, found in models for rate in found.values()), default=1)
    over = f" of the means over {seeds} seeds" if seeds > 1 else ""
    return [f"In brackets: 95 % intervals{over}. Answers read: {', '.join(told)}.", *lines] if told else []
