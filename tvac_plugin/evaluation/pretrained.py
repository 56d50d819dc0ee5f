"""Loads what `from_pretrained` loads, and runs no code that comes with it unless the recipe says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.boundary.paths import local_path


@contextmanager
def refusing_code(source: Path | str, *, trust_remote_code: bool) -> Iterator[None]:
    """Says in a sentence why loading `source` would have run code that is in it.

    Raises:
        UserError: It brings Python code that is not trusted, or its weights are a pickle with more than weights in it.
    """
    try:
        yield
    except Exception as error:
        if type(error).__name__ == "UnpicklingError":
            raise UserError(
                f"{source} has pickled weights that are damaged or hold more than weights, so they were not read. Ask "
                "for them as safetensors."
            ) from error
        if isinstance(error, ValueError) and "trust_remote_code" in str(error) and not trust_remote_code:
            raise UserError(
                f"{source} brings Python code of its own, which is not run unless the recipe says so. Read that code, "
                "then set `trust_remote_code: true` in this recipe, or use another model."
            ) from error
        raise


def load_pretrained(auto_class: Any, source: Path | str, *, trust_remote_code: bool, **options: Any) -> Any:
    """Calls `auto_class.from_pretrained` with `source` and `options`.

    Raises:
        UserError: As `refusing_code`.
    """
    with refusing_code(source, trust_remote_code=trust_remote_code):
        return auto_class.from_pretrained(source, trust_remote_code=trust_remote_code, **options)


def folder_or_hub_id(source: str) -> Path | str:
    """The folder of that name on this machine, or the name itself for the hub."""
    path = local_path(source)
    return path if path is not None and path.is_dir() else source
