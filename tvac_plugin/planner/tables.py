"""A plan as text."""

from __future__ import annotations

from typing import Any

import yaml

from tvac_plugin.planner.ledger import KINDS
from tvac_plugin.planner.plan import GIB, RecipePlan


def plan_text(plan: RecipePlan) -> str:
    """The table of all arms, then whether the recipe's own fits and what to change if not."""
    lines = [
        f"{plan.model_type}, {plan.num_layers} layers, {plan.num_trainable:,} trainable parameters. GiB at the peak:",
        "",
        *_table(plan),
        "",
        "time: counted work over that of supervised fine-tuning. A defense that draws layers: bytes with the costliest "
        f"draw, time over {_draws(plan)}.",
    ]
    return "\n".join([*lines, *_verdict(plan)])


def _draws(plan: RecipePlan) -> str:
    if not plan.num_probes:
        return "uniform draws"
    return f"draws with the probabilities of {plan.num_probes} probe{'s' if plan.num_probes > 1 else ''}"


def _table(plan: RecipePlan) -> list[str]:
    rows = [["", *plan.arms]]
    for kind in KINDS:
        rows.append([kind.replace("_", " "), *(_gib(arm.at_peak[kind]) for arm in plan.arms.values())])
    rows.append(["peak", *(_gib(arm.peak) for arm in plan.arms.values())])
    rows.append(["time", *(f"{arm.relative_time:.2f}" for arm in plan.arms.values())])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(_cell(cell, widths[i], i) for i, cell in enumerate(row)) for row in rows]


def _cell(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column == 0 else cell.rjust(width)


def _verdict(plan: RecipePlan) -> list[str]:
    if plan.gpu is None:
        return []
    need = plan.arms[plan.defense].peak + plan.reserve
    is_enough = "fits" if plan.fits else "does not fit"
    lines = [
        f"{plan.defense} {is_enough}: {_gib(need)} of {_gib(plan.gpu)} GiB, {_gib(plan.reserve)} of them for the CUDA "
        "context and fragmentation."
    ]
    for remedy in plan.remedies:
        answer = "fits" if remedy.fits else "does not fit either"
        lines.append(f"with {_settings(remedy.changes)}: {_gib(remedy.peak + plan.reserve)} GiB, {answer}")
    if plan.remedies and not plan.remedies[-1].fits:
        lines.append("none of these is enough. Take a larger GPU or a smaller model.")
    return lines


def _settings(changes: dict[str, Any]) -> str:
    return yaml.safe_dump(changes, default_flow_style=True, width=1000, sort_keys=False).strip().strip("{}")


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
