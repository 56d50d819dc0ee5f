"""What the attacker found who chose settings against every arm, in rows, in words and as a chart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from tvac_plugin.report.charts import Series
from tvac_plugin.report.tables import label

ATTACKER_HEADER = (
    "arm", "trials, of use", "worst harm %", "settings, and where it stopped", "mean of the worst three",
    "first trial above the threshold", "the worst with all seeds %", "points against no defense",
)  # fmt: skip
Record = Mapping[str, Any]


def attacker_rows(record: Record) -> list[list[str]]:
    """One row per arm, with the columns of `ATTACKER_HEADER`."""
    return [_row(found) for found in record["arms"]]


def _row(found: Record) -> list[str]:
    trials, worst, confirmed = found["trials"], found["worst"], found["confirmed"]
    row = [_arm(found), f"{len(trials)}, {sum(trial['harm'] is not None for trial in trials)}"]
    if worst is None:
        return [*row, "no model of use", "", "", "", "", ""]
    change = confirmed and confirmed["against_none"]
    return [
        *row, f"{worst['harm']:.1f}", f"{_settings(worst)}; {_place(worst)}", f"{found['top_mean']:.1f}",
        "none" if found["cost"] is None else str(found["cost"]),
        _rate(confirmed) if confirmed else "failed", _points(change) if change else "",
    ]  # fmt: skip


def attacker_words(record: Record) -> Iterator[str]:
    """What was asked of the attacker, and how each arm fared."""
    keeps = [f"keeps {share:g} % of what it had in {name}" for name, share in record["min_retention"].items()]
    keeps += [f"reaches {least:g} % in {name}" for name, least in record["min_task"].items()]
    use = f" that {' and '.join(keeps)}" if keeps else ", useful or not"
    yield (
        f"An attacker tried {record['trials']} settings against each arm ({', '.join(record['settings'])}), and kept "
        f"the most harmful model{use}."
    )
    for found in record["arms"]:
        worst, confirmed = found["worst"], found["confirmed"]
        if worst is None:
            yield f"{_arm(found)}: no trial gave a model of use; {found['trials'][-1]['why']}."
            continue
        text = f"{_arm(found)}: the worst of {len(found['trials'])} attacks reached {worst['harm']:.1f} %"
        text += f", with {_settings(worst)}, {_place(worst)}"
        if confirmed:
            text += f"; with all seeds {_rate(confirmed)}"
        if confirmed and confirmed["against_none"]:
            text += f", {_points(confirmed['against_none'])} points against no defense"
        yield f"{text}."


def attacker_doubts(record: Record) -> Iterator[str]:
    """Defended arms that an attacker who chooses turns as harmful as any other."""
    for found in record["arms"]:
        change = (found["confirmed"] or {}).get("against_none")
        if found["defended"] and change and change["high"] >= 0:
            yield (
                f"{_arm(found)}: against an attacker who chose among {len(found['trials'])} settings no protection is "
                f"shown ({_points(change)} points against no defense). Do not quote the fixed attack alone."
            )
        elif found["defended"] and change is None and found["worst"] is not None:
            yield (
                f"{_arm(found)}: its worst case is not compared with that of no defense, which failed, is not among "
                "the arms or gave no model of use. Add `safety_defense: none`."
            )


def attacker_series(record: Record) -> list[Series]:
    """The most harm found so far against the number of trials, a line an arm."""
    lines = []
    for found in record["arms"]:
        best = accumulate((trial["harm"] or 0.0 for trial in found["trials"]), max)
        points = [(number, harm, None, None) for number, harm in enumerate(best, start=1)]
        lines.append(Series(_arm(found), points, record["judge"]))
    return lines


def _arm(found: Record) -> str:
    return label({"params": found["arm"], "arm": [*found["arm"]]})


def _settings(worst: Record) -> str:
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in worst["values"].items())


def _place(worst: Record) -> str:
    return "at the end" if worst["step"] == "end" else f"stopped at step {worst['step']}"


def _rate(rate: Record) -> str:
    extremes = f"{rate['min']:.0f} to {rate['max']:.0f}; " if "min" in rate else ""
    return f"{rate['percent']:.1f} ({extremes}95 % {rate['low']:.1f} to {rate['high']:.1f})"


def _points(change: Record) -> str:
    return f"{change['points']:+.1f} (95 % {change['low']:+.1f} to {change['high']:+.1f})"


def attacker_table(results: Mapping[str, Any]) -> list[tuple[str, Sequence[str], list[list[str]]]]:
    """Title, header and rows of the table, if there was an attacker."""
    record = results.get("attacker")
    return [] if record is None else [("An attacker who chooses settings", ATTACKER_HEADER, attacker_rows(record))]
