"""The trace of a run: one JSON line per event, cut back to a checkpoint when the run is resumed from it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from logging import getLogger
from pathlib import Path
from typing import Any

from tvac_plugin.boundary.files import naming, write_text

TRACE_FILE = "safety_trace.jsonl"
LOG = getLogger(__name__)


class Trace:
    """Appends to the trace in one output folder."""

    def __init__(self, output_dir: Path) -> None:
        """Names the file; nothing is written yet."""
        self.path = output_dir / TRACE_FILE

    def start(self) -> None:
        """Empties it."""
        write_text(self.path, "")

    def append(self, line: Mapping[str, Any]) -> None:
        """Adds a line; what is not a number becomes null, which every reader of JSON knows."""
        text = json.dumps({key: _finite(value) for key, value in line.items()}, allow_nan=False)
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def position(self) -> dict[str, Any]:
        """What was written so far: its length and its hash, as JSON values."""
        content = _read(self.path)
        return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    def resume(self, position: Mapping[str, Any], *, earlier: Path) -> None:
        """Goes on from `position` in the trace of the folder `earlier`, which may be this one.

        What a killed run wrote after its checkpoint is dropped, half a line included. If the trace there is not the
        one that led to the checkpoint, this one starts anew.
        """
        kept = _read(earlier / TRACE_FILE)[: position["bytes"]]
        if hashlib.sha256(kept).hexdigest() != position["sha256"]:
            LOG.warning(
                f"{earlier / TRACE_FILE} is not the trace that led to the checkpoint, so {self.path} begins at the "
                "resumed step. Resume from the folder that the run wrote itself to keep the whole trace."
            )
            kept = b""
        write_text(self.path, kept.decode("utf-8"))


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
