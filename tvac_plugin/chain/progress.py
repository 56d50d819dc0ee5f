"""How far a running job is, read from its log."""

from __future__ import annotations

import re
from pathlib import Path

_BAR = re.compile(r"(?:^|[\r\n])([^\r\n|]{0,80}?) *\d+%\|[^|\r\n]*\| (\d+)/(\d+) \[[^<\]]*<([^,\]]+)")
"""A progress bar of tqdm: description, done, all, time left."""
_LOSS = re.compile(r"'loss': '?([\d.eE+-]+)")
_TAIL_BYTES = 32_768


def progress(log: Path) -> str | None:
    """The last progress bar in a job's log in words, with the last loss; `None` where there is none yet."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return None
    bars, losses = _BAR.findall(text), _LOSS.findall(text)
    if not bars:
        return None
    description, done, total, left = bars[-1]
    words = [f"{description.rstrip(':')}: " if description else "", f"{done} of {total}"]
    words += [f", loss {float(losses[-1]):.3g}"] if losses else []
    return "".join(words) + (f", {left} left" if left != "?" else "")
