"""Harm at matched utility in rows and in words: what an attack does once its user has got somewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

MATCHED_HEADER = (
    "run", "share of the undefended user's best", "task %", "first reached", "harmful score %",
    "points against no defense",
)  # fmt: skip
CURVE_HEADER = ("run", "step", "task %", "harmful score %")
NO_TASK = "without a defense the user never does the task, so harm cannot be read at matched utility"


def matched_rows(run: str, found: Mapping[str, Any]) -> list[list[str]]:
    """One row per share of the undefended user's task, with the columns of `MATCHED_HEADER`."""
    if not found["at"]:
        return [[run, "", "0.0", NO_TASK, "", ""]]
    return [
        [run, f"{at['share']} %", f"{at['target']:.1f}", _places(at, found), _rate(at["harmful_score"]),
         _change(at.get("against_none"))]
        for at in found["at"]
    ]  # fmt: skip


def curve_rows(run: str, curve: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """One row per step of an attack, with the columns of `CURVE_HEADER`."""
    return [[run, str(p["step"]), _rate(p["utility"]), _rate(p["harmful_score"])] for p in curve]


def matched_words(found: Mapping[str, Any]) -> str:
    """What happened to a defended run: its harm where its user has got as far as the undefended one."""
    lowest = found["at"][0]
    if lowest["verdict"] == "never":
        return (
            f"never reaches {lowest['share']} % of the undefended user's task within the attack ({_best(found)}), so a "
            "low harmful score is no success."
        )
    task = " of the undefended user's task"
    clauses = [f"at {at['share']} %{'' if at is not lowest else task}: {_clause(at, found)}" for at in found["at"]]
    return f"{'; '.join([*clauses, *_cautions(found)])}."


def cost_words(step: int | None, share: float | None) -> str:
    """An attack's cost, and how far its user was then."""
    if step is None:
        return "not within the attack"
    return f"after {step} steps" + (
        "" if share is None else f" (the task then at {share:.0f} % of the undefended user's best)"
    )


def _clause(at: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    change = at["against_none"]
    if at["verdict"] == "never":
        return f"never reached within the attack ({_best(found)})"
    if change is None:
        return f"a harmful score of {at['harmful_score']['percent']:.1f}, not comparable with that of no defense"
    points = f"{abs(change['points']):.1f}"
    points = (
        "no difference in harm"
        if points == "0.0"
        else (f"{points} points {'more' if change['points'] > 0 else 'less'} harm")
    )
    told = f"95 % {change['low']:+.1f} to {change['high']:+.1f}"
    noise = ", within the noise" if change["within_noise"] else ""
    return f"{points} ({_seeds(at)}{told}{noise}){''.join(_starts(at))}"


def _seeds(at: Mapping[str, Any]) -> str:
    reached, seeds = at["num_reached"], at["num_seeds"]
    if reached < seeds:
        return f"reached in {reached} of {seeds} seeds, read in these; "
    return f"mean of {seeds} seeds; " if seeds > 1 else ""


def _starts(at: Mapping[str, Any]) -> Iterator[str]:
    """Says which side has the share before any attack."""
    ours, theirs = at["num_from_start"], at["num_undefended_from_start"]
    if ours:
        where = _start(at["steps"])
        yield f", read {where}{_some(ours, at)} because the model does this much already"
    if theirs:
        where = _start(at["undefended_steps"])
        yield f"{' and' if ours else ','} against the undefended model {where}{_some(theirs, at)}"


def _start(steps: Sequence[float | None]) -> str:
    first = min(step for step in steps if step is not None)
    return "before the attack" if first == 0 else f"at the first checkpoint (step {first:g})"


def _some(count: int, at: Mapping[str, Any]) -> str:
    return "" if count == at["num_seeds"] else f" in {count} of {at['num_seeds']} seeds"


def _cautions(found: Mapping[str, Any]) -> Iterator[str]:
    slower = [f"{at['share']} %" for at in found["at"] if at["verdict"] == "slower"]
    if slower:
        yield (
            f"harm is less at equal steps, but not at {' and '.join(slower)} of the task within the intervals: as far "
            "as these tell, the defense only slows all learning"
        )
    unlearnt = found["num_seeds"] - found["num_learnt"]
    if unlearnt:
        yield f"without a defense the user gets no better at the task{_some(unlearnt, found)}"


def _places(at: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    steps = at["steps"]
    places = ["never" if s is None else f"step {round(s, 1):g}" if s else "before the attack" for s in steps]
    return ", ".join(places) + (f" ({_best(found)})" if at["num_reached"] < at["num_seeds"] else "")


def _best(found: Mapping[str, Any]) -> str:
    shares = [f"{share:.1f} %" for share in found["best_share"] if share is not None]
    return f"at best {', '.join(shares)}"


def _rate(rate: Mapping[str, Any] | None) -> str:
    if rate is None:
        return ""
    extremes = (
        f"min {rate['min']:.1f}, max {rate['max']:.1f} of {rate['num_seeds']} seeds; 95 % " if "min" in rate else ""
    )
    return f"{rate['percent']:.1f} ({extremes}{rate['low']:.1f} to {rate['high']:.1f})"


def _change(change: Mapping[str, Any] | None) -> str:
    if change is None:
        return ""
    noise = ", within the noise" if change["within_noise"] else ""
    return f"{change['points']:+.1f} (95 % {change['low']:+.1f} to {change['high']:+.1f}){noise}"
