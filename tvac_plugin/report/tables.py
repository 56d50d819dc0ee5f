"""Results as plain text tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from tvac_plugin.boundary.errors import printable
from tvac_plugin.provenance.manifest import share_defended
from tvac_plugin.report.matched import cost_words


def evaluation_table(results: Mapping[str, Any]) -> str:
    """One line per model, one column per measure, each rate with its interval and counts."""
    measures = list(next(iter(results["models"].values())))
    rows = [[name, *(cell(found[measure]) for measure in measures)] for name, found in results["models"].items()]
    notes = {note(m, found[m]) for found in results["models"].values() for m in measures}
    opinions = [
        f"{name}, {measure.replace('_', ' ')}: {words}"
        for name, found in results["models"].items()
        for measure in measures
        if (words := second_opinion(found[measure])) is not None
    ]
    table = text_table(["model", *map(title, measures)], rows)
    return printable(table + "\n\n" + "\n".join([*sorted(notes), *opinions]))


def second_opinion(rate: Mapping[str, Any]) -> str | None:
    """What the second judge of a measure found, in words; `None` without one."""
    found = rate.get("second_judge")
    if found is None:
        return None
    if found["agreement"] is None:
        return f"{found['judge']} and {rate['judge']} have read no answer in common"
    read = sum(found[key] for key in ("both", "first_only", "second_only", "neither"))
    kappa = "" if found["kappa"] is None else f" (kappa {found['kappa']:.2f})"
    return (
        f"{found['judge']} says {found['percent']:.1f} %, and agrees with {rate['judge']} on "
        f"{found['agreement']:.0f} % of the {read} answers that both read{kappa}"
    )


def title(measure: str) -> str:
    """The title of a measure's column."""
    return "loss ratio" if measure == "retention" else f"{measure.replace('_', ' ')} %"


def note(measure: str, rate: Mapping[str, Any]) -> str:
    """How a measure was taken."""
    if "ratio" in rate:
        return f"{measure}: loss per token of benign answers, divided by that of {rate['of']}; above 1 is worse"
    neither = "; neither: not harmful and no refusal either, as broken models answer" if "num_neither" in rate else ""
    asked = f"; prompts rewritten as `{rate['asked']}`" if "asked" in rate else ""
    begun = f"; answers made to begin with `{rate['prefill']}`" if "prefill" in rate else ""
    return f"{measure.replace('_', ' ')}: judged by {rate['judge']}{asked}{begun}{neither}"


def cell(rate: Mapping[str, Any]) -> str:
    """A rate with its spread in the space of a table's cell."""
    return f"{number(rate)} ({spread(rate)})"


def number(rate: Mapping[str, Any]) -> str:
    """A rate in percent, or the ratio of two losses."""
    return f"{rate['ratio']:.3f}" if "ratio" in rate else f"{rate['percent']:.1f}"


def spread(rate: Mapping[str, Any]) -> str:
    """How sure a rate is: its 95 % interval and counts, and over several seeds the least and the largest."""
    digits = 3 if "ratio" in rate else 1
    interval = f"{rate['low']:.{digits}f} to {rate['high']:.{digits}f}"
    if "min" in rate:
        extremes = f"min {rate['min']:.{digits}f}, max {rate['max']:.{digits}f} of {rate['num_seeds']} seeds"
        interval = f"{extremes}; 95 % {interval}"
    return f"{interval}, n = {counts(rate)}"


def counts(rate: Mapping[str, Any]) -> str:
    """The answers that a rate rests on, and those that say neither or could not be scored."""
    if "ratio" in rate:
        return str(rate["num_rows"])
    others = [f", {rate[key]} {key.removeprefix('num_')}" for key in ("num_neither", "num_unscored") if rate.get(key)]
    return f"{rate['num_scored']}{''.join(others)}"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def header(measures: Sequence[str]) -> list[str]:
    """The titles of the columns of `model_rows`."""
    return ["run", "model", *map(title, measures)]


def model_rows(entries: Sequence[Mapping[str, Any]], measures: Sequence[str]) -> list[list[str]]:
    """One row per model of groups of cells, or of single cells."""
    return [
        [run, name, *(cell(found[m]) if m in found else "" for m in measures)]
        for run, name, found in shown_models(entries)
    ]


def shown_models(entries: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Run, model and measures of each model; a base model with the same numbers in several runs only once."""
    bases: list[Mapping[str, Any]] = []
    for entry in entries:
        for name, found in entry["models"].items():
            if entry["roles"].get(name) != "base":
                yield label(entry), model_label(entry, name), found
            elif found not in bases:
                bases.append(found)
                yield "" if len(entries) > 1 else label(entry), name, found


def single_runs(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The finished cells, if a summary takes some of them together."""
    has_seeds = any(entry["num_finished"] > 1 for entry in results["summary"])
    return [found for found in results["cells"] if has_seeds and found["status"] == "finished"]


def label(entry: Mapping[str, Any]) -> str:
    """A cell, or a group of cells, in words: its arm as `t_vaccine + rho=1 + stage.key=2`, then its other keys."""
    params = entry["params"]
    arm = [key for key in params if key in entry["arm"] or key == "safety_defense"]
    short = [_without_defense(key, str(params.get("safety_defense"))) for key in arm]
    names = short if len({*short}) == len(short) else arm
    arm_words = [
        f"{params[key]}" if key == "safety_defense" else f"{name}={params[key]}"
        for key, name in zip(arm, names, strict=True)
    ]
    others = [f"{key} {value}" for key, value in params.items() if key not in arm]
    return ", ".join(filter(None, [" + ".join(arm_words), *others])) or "all"


def _without_defense(key: str, defense: str) -> str:
    """A key of the block of a run's own defense without stage and block."""
    _, _, inner = key.partition(".")
    return inner.removeprefix(f"{defense}.") if inner.startswith(f"{defense}.") else key


def model_label(entry: Mapping[str, Any], name: str) -> str:
    """A model's name, and whose weights it has if its stage was skipped."""
    stand_in = entry["skipped"].get(name)
    return name if stand_in is None else f"{name} (skipped: {stand_in})"


def sentences(results: Mapping[str, Any]) -> list[str]:
    """What the numbers say and do not say, in words."""
    lines = []
    for entry in results["summary"]:
        for name, measures in reversed(entry["against_none"].items()):
            for measure, change in measures.items():
                lines.append(_difference(label(entry), name, measure, change))
        lines += _costs(entry, results)
    for name, facts in results["jobs"].items():
        drawn = Counter(layer for event in facts.get("trace") or [] for layer in event.get("layers", ()))
        if drawn:
            times = ", ".join(f"{layer}: {number}" for layer, number in sorted(drawn.items()))
            lines.append(f"{name}: layers drawn, times: {times}.")
        if (facts.get("safety_defense") or {}).get("measured_batches"):
            lines.append(f"{name}: {share_defended(facts['safety_defense'])}")
    lines += _found_settings(results.get("search"))
    for found in results["cells"]:
        lines += [f"{label(found)}: FAILED. {problem}" for problem in found["problems"]]
    return lines


def _found_settings(search: Mapping[str, Any] | None) -> Iterator[str]:
    """Which settings were found by trial, and among how many."""
    if search is None:
        return
    for found in search["arms"]:
        chosen = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in found["chosen"].items())
        counted = sum(trial["why"] is None for trial in found["trials"])
        yield (
            f"{found['arm'].get('safety_defense', 'arm')}: {chosen} is the best of {len(found['trials'])} trials, of "
            f"which {counted} count, as `{search['judge']}` decided on questions of its own."
        )


def _costs(entry: Mapping[str, Any], results: Mapping[str, Any]) -> Iterator[str]:
    threshold, stages = results["asked"]["attack_threshold"], curve_stages(results)
    for stage, steps in entry["attack_cost"].items():
        matched = entry["matched_utility"].get(stage)
        shares = [None] * len(steps) if matched is None else matched["cost_share"]
        costs = [cost_words(step, share) for step, share in zip(steps, shares, strict=True)]
        yield f"{of_stage(label(entry), stage, stages)}: harmful score above {threshold:g} %: {', '.join(costs)}."


def curve_stages(results: Mapping[str, Any]) -> set[str]:
    """The attacks that a chain has curves of."""
    return {stage for cell in results["cells"] for stage in cell["curves"]}


def of_stage(run: str, stage: str, stages: Collection[str]) -> str:
    """A run in words, with the stage that is meant where there are several."""
    return f"{run}, {stage}" if len(stages) > 1 else run


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
