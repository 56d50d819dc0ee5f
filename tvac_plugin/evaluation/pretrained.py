"""Loads what `from_pretrained` loads, and runs no code that comes with it unless the recipe says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tvac_plugin.names import local_path


def load_pretrained(auto_class: Any, source: Path | str, *, trust_remote_code: bool, **options: Any) -> Any:
    """Calls `auto_class.from_pretrained`.

    Args:
        auto_class: A class of transformers, as `AutoModelForCausalLM`.
        source: A folder or a hub id.
        trust_remote_code: Whether Python code in it may run.
        **options: As `from_pretrained` takes them.

    Raises:
        ValueError: It brings code of its own, which is not trusted.
    """
    try:
        return auto_class.from_pretrained(source, trust_remote_code=trust_remote_code, **options)
    except ValueError as error:
        if trust_remote_code or "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{source} brings Python code of its own, which is not run unless the recipe says so. Read that code, then "
            "set `trust_remote_code: true` in this recipe, or use another model."
        ) from error


def folder_or_hub_id(source: str) -> Path | str:
    """The folder of that name on this machine, or the name itself for the hub."""
    path = local_path(source)
    return path if path is not None and path.is_dir() else source
