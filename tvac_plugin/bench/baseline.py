"""An earlier benchmark that a new one is held against: counts exactly, times within a tolerance."""

from __future__ import annotations

from pathlib import Path

from tvac_plugin.bench.results import CaseResult, Draw, Results
from tvac_plugin.bench.settings import Settings, defense_settings
from tvac_plugin.bench.shape import Shape
from tvac_plugin.boundary.files import write_json

TOLERANCE_PERCENT = 10.0
EXACT = {
    "layer_forwards": "decoder layers run",
    "layer_backwards": "decoder layers differentiated",
    "flops": "FLOPs",
    "saved_bytes": "saved bytes",
}
_WAY_OUT = "Give the same options, or write a new one with --write-baseline."
_PACKAGES = ("torch", "transformers", "trl", "peft")


def write_baseline(results: Results, path: Path) -> None:
    """Writes the main run without its raw samples, in the format of `bench.json`."""
    cases = {name: case.model_copy(update={"seconds": []}) for name, case in results.main.cases.items()}
    main = results.main.model_copy(update={"cases": cases})
    write_json(path, results.model_copy(update={"runs": [main]}).model_dump(mode="json"))


def comparison_problem(baseline: Results, shape: Shape, settings: Settings) -> str | None:
    """Why a run of `settings` on `shape` cannot be compared with `baseline`, if it cannot."""
    if shape != baseline.main.shape:
        return f"it was taken on another shape, {_difference(shape, baseline.main.shape)}. {_WAY_OUT}"
    are_timed = bool(settings.repeats and baseline.settings.repeats)
    for key in ("seed", "draws", "host_metrics", "probabilities", *(["threads"] if are_timed else [])):
        theirs, ours = getattr(baseline.settings, key), getattr(settings, key)
        if theirs != ours:
            return f"it was taken with {key} {theirs}, this is with {ours}. {_WAY_OUT}"
    for name in settings.defenses:
        case, ours = baseline.main.cases.get(name), defense_settings(name, shape, settings).model_dump(mode="json")
        if case is not None and case.settings != ours:
            return f"it was taken with other settings of {name}, {case.settings}, this is with {ours}. {_WAY_OUT}"
    return None


def _difference(shape: Shape, other: Shape) -> str:
    theirs = other.model_dump()
    return ", ".join(f"{key} {theirs[key]} and not {value}" for key, value in shape if value != theirs[key])


def regressions(results: Results, baseline: Results, *, tolerance_percent: float = TOLERANCE_PERCENT) -> list[str]:
    """What got worse since `baseline`, or is counted otherwise, one sentence each.

    Cases that only one of them has are left out; `comparison_problem` tells whether the two can be compared.
    """
    found = []
    for name, now in results.main.cases.items():
        then = baseline.main.cases.get(name)
        if then is not None:
            sentences = [*_exact(now, then), *_slower(now, then, tolerance_percent)]
            found += [f"{name}: {sentence}" for sentence in sentences]
    return found + _other_versions(results, baseline) if found else []


def _exact(now: CaseResult, then: CaseResult) -> list[str]:
    sentences = []
    for count, words in EXACT.items():
        pairs = [(getattr(a, count), getattr(b, count), a) for a, b in zip(now.draws, then.draws, strict=True)]
        changed = [pair for pair in pairs if pair[0] != pair[1]]
        if changed:
            ours, theirs, draw = max(changed, key=lambda pair: int(pair[0]) - int(pair[1]))
            verdict = "more" if ours > theirs else "less; if that is meant, write a new baseline"
            sentences.append(f"{words}: {theirs:,} before, {ours:,} now{_where(draw)}: {verdict}.")
    if then.same_as_sft and not now.same_as_sft:
        sentences.append("no longer SFT bit for bit.")
    return sentences


def _where(draw: Draw) -> str:
    return f" with layers {draw.layers}" if draw.layers else ""


def _slower(now: CaseResult, then: CaseResult, tolerance_percent: float) -> list[str]:
    if now.time_ratio is None or then.time_ratio is None:
        return []
    most = then.time_ratio * (1 + tolerance_percent / 100)
    if now.time_ratio <= most:
        return []
    return [
        f"time {now.time_ratio:.2f} x SFT, {then.time_ratio:.2f} before; {most:.2f} is within {tolerance_percent:g} %."
    ]


def _other_versions(results: Results, baseline: Results) -> list[str]:
    return [
        f"{name} was {baseline.versions[name]} and is {results.versions.get(name)}, which alone may explain it."
        for name in _PACKAGES
        if name in baseline.versions and baseline.versions[name] != results.versions.get(name)
    ]
