"""How a recipe's data are divided, so that no row both trains, attacks and is asked about."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.boundary.paths import local_path
from tvac_plugin.data.jsonl import json_rows
from tvac_plugin.data.row_checks import part_of
from tvac_plugin.starter.rows import Row, parsed, unique

MOST_TASK_ROWS, MOST_ASKED = 1000, 200
FEWEST_ROWS = 50
"""A data set with fewer is not divided: a tenth of it would be too few for an attack with a harmful row."""
_ROWS = re.compile(r"(\w+)\[(\d*):(\d+)\]")
_PERCENT = re.compile(r"(\w+)(?:\[(?:(\d*)%?)?:(?:(\d+)%)?\])?")


class Division(NamedTuple):
    """One entry of `datasets:` in three parts.

    Attributes:
        train: `split:` of what is trained on with the defense.
        task: `split:` of what the simulated user wants to learn; empty if that comes from elsewhere.
        asked: `split:` of what the models are asked.
        rows: The rows of the three parts, each without the questions of those before; `None` where the data are not
            files that can be read here.
    """

    train: str
    task: str
    asked: str
    rows: tuple[list[Row], list[Row], list[Row]] | None = None


def divide(entry: Mapping[str, Any], *, where: str, with_task: bool) -> Division:
    """Divides an entry: of a file by rows, of a data set elsewhere by rows or, where its length is unknown, in percent.

    Raises:
        UserError: It cannot be read, is too small, or has a `split:` that cannot be divided.
    """
    path = local_path(str(entry.get("path")))
    split = str(entry.get("split") or "train")
    if path is None or path.suffix not in (".json", ".jsonl"):
        return _unread(split, where=where, with_task=with_task)
    try:
        values = [value for _, value in json_rows(path)]
        used = sorted(part_of(split, len(values)))
    except OSError as error:
        raise UserError(
            f"{where}: {path} cannot be read ({error.strerror}). Correct `path:`, relative to where you start this."
        ) from error
    except UserError as error:
        raise UserError(f"{where}: {path}, {error}") from error
    if len(used) < FEWEST_ROWS or used[-1] - used[0] + 1 != len(used):
        raise UserError(
            f"{where}: {path} has {len(used)} rows in `split: {split}`, and {FEWEST_ROWS} in a row are needed to hold "
            "some out for the attack and the evaluation. Add rows."
        )
    division = _of_range("train", used[0], used[-1] + 1, with_task=with_task)
    read: list[list[Row]] = []
    for part in (division.train, division.task, division.asked):
        numbers = sorted(part_of(part, len(values))) if part else []
        rows = [row for row in (parsed(values[i], entry) for i in numbers) if row is not None]
        read.append(unique(rows, without=[row for earlier in read for row in earlier]))
    return division._replace(rows=(read[0], read[1], read[2]))


def _unread(split: str, *, where: str, with_task: bool) -> Division:
    """Divides what cannot be read, by rows or in percent; holds out what `split` leaves, where it leaves enough."""
    rows, percent = _ROWS.fullmatch(split), _PERCENT.fullmatch(split)
    if rows is not None:
        return _of_range(rows[1], int(rows[2] or 0), int(rows[3]), with_task=with_task)
    if percent is not None:
        first, last = int(percent[2] or 0), int(percent[3] or 100)
        part = max(1, (last - first) // 10)
        needed = part * (1 + with_task)
        end = last if last + needed <= 100 else last - needed
        if end > first:
            task = end + part * with_task
            parts = [_percent(percent[1], *ends) for ends in ((first, end), (end, task), (task, task + part))]
            return Division(split if end == last else parts[0], parts[1] if with_task else "", parts[2])
    raise UserError(
        f"{where}: `split: {split}` cannot be divided further. Write it as `train`, as rows, `train[:5000]`, or as "
        "percent, `train[:20%]`."
    )


def _percent(name: str, first: int, last: int) -> str:
    return f"{name}[{f'{first}%' if first else ''}:{f'{last}%' if last < 100 else ''}]"


def _of_range(name: str, first: int, last: int, *, with_task: bool) -> Division:
    tenth = max(1, (last - first) // 10)
    asked = last - min(MOST_ASKED, tenth)
    task = asked - (min(MOST_TASK_ROWS, tenth) if with_task else 0)
    return Division(
        f"{name}[{first}:{task}]", f"{name}[{task}:{asked}]" if with_task else "", f"{name}[{asked}:{last}]"
    )
