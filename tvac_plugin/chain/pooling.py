"""Rates and differences of several seeds as one number with an interval, in percent and percentage points."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import t as student

from tvac_plugin.evaluation.agreement import Agreement

Rate = Mapping[str, Any]
"""`percent` with the 95 % interval from `low` to `high`, and what makes it comparable: `judge`, `prompts_sha256`."""


def over_seeds(rates: Sequence[Rate]) -> dict[str, Any]:
    """The measured rates of several seeds as one, with the counts of all; or their ratios."""
    if len(rates) == 1:
        return {**rates[0], "num_seeds": 1}
    if "ratio" in rates[0]:
        return {**rates[0], **_mean_ratio(rates)}
    second = {"second_judge": _second(rates)} if "second_judge" in rates[0] else {}
    neither = {"num_neither": sum(rate["num_neither"] for rate in rates)} if "num_neither" in rates[0] else {}
    return {
        **rates[0], **mean_rate(rates), **neither, **second,
        "num_scored": sum(rate["num_scored"] for rate in rates),
        "num_unscored": sum(rate["num_unscored"] for rate in rates),
    }  # fmt: skip


def _second(rates: Sequence[Rate]) -> dict[str, Any]:
    found = [rate["second_judge"] for rate in rates]
    return {"judge": found[0]["judge"], **Agreement.over_seeds(found).as_json()}


def mean_rate(rates: Sequence[Rate]) -> dict[str, Any]:
    """The mean of one rate per seed with `min` and `max`; its interval is the wider of Student's and the mean one."""
    if len(rates) == 1:
        return {key: rates[0][key] for key in ("percent", "low", "high")} | {"num_seeds": 1}
    spread = _spread([rate["percent"] for rate in rates], [(rate["low"], rate["high"]) for rate in rates])
    return {
        "percent": spread.pop("mean"), **spread,
        "low": max(0.0, spread["low"]), "high": min(100.0, spread["high"]), "num_seeds": len(rates),
    }  # fmt: skip


def _mean_ratio(ratios: Sequence[Rate]) -> dict[str, Any]:
    spread = _spread([found["ratio"] for found in ratios], [(found["low"], found["high"]) for found in ratios])
    return {"ratio": spread.pop("mean"), **spread, "low": max(0.0, spread["low"]), "num_seeds": len(ratios)}


def difference(a: Rate, b: Rate | None) -> dict[str, float] | None:
    """The difference of two rates with a 95 % interval (Newcombe's, from their own intervals).

    `None` if they are not comparable, or ratios.
    """
    if b is None or "percent" not in a or not is_comparable(a, b):
        return None
    points = a["percent"] - b["percent"]
    low = points - math.hypot(a["percent"] - a["low"], b["high"] - b["percent"])
    high = points + math.hypot(a["high"] - a["percent"], b["percent"] - b["low"])
    return {"points": round(points, 4), "low": round(low, 4), "high": round(high, 4)}


def is_comparable(a: Rate, b: Rate) -> bool:
    """Whether one judge read the answers to the same prompts."""
    return bool(a.get("prompts_sha256") == b.get("prompts_sha256") and a["judge"] == b["judge"])


def pooled(changes: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The mean of one difference per seed, and whether it is within the noise."""
    found: dict[str, Any] = dict(changes[0])
    if len(changes) > 1:
        spread = _spread([change["points"] for change in changes], [(c["low"], c["high"]) for c in changes])
        found = {
            "points": spread.pop("mean"), **spread, "num_seeds": len(changes),
            "low": max(-100.0, spread["low"]), "high": min(100.0, spread["high"]),
        }  # fmt: skip
    return found | {"within_noise": found["low"] <= 0 <= found["high"]}


def _spread(values: Sequence[float], intervals: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Mean, extremes and interval of one number per seed."""
    mean = statistics.fmean(values)
    t95 = float(student.ppf(0.975, df=len(values) - 1))
    half = t95 * statistics.stdev(values) / math.sqrt(len(values))
    found = {
        "mean": mean, "min": min(values), "max": max(values),
        "low": min(mean - half, statistics.fmean(low for low, _ in intervals)),
        "high": max(mean + half, statistics.fmean(high for _, high in intervals)),
    }  # fmt: skip
    return {name: round(value, 4) for name, value in found.items()}
