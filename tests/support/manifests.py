"""Manifests as a defended run leaves them."""

from __future__ import annotations

from typing import Any


def manifest_of(files: dict[str, str], *, defense: str = "t_vaccine", steps: int = 7, **changes: Any) -> dict[str, Any]:
    """A manifest that states an effect in every step."""
    return {
        "format": 3, "defense": defense, "settings": {}, "seed": 1, "data": {}, "base_model": {"name": "", "files": {}},
        "steps": steps, "defended_steps": steps, "measured_batches": steps, "idle_batches": 0, "moved_tensors": 1,
        "moved_share": 0.5,
        "files": files,
    } | changes  # fmt: skip
