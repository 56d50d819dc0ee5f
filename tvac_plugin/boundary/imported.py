"""Classes of the user's own, named in a recipe by their import path."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tvac_plugin.boundary.errors import UserError


def import_class(path: str, base: type, *, key: str) -> type[Any]:
    """Imports the class at `path`, looking in the current folder too; importing a module runs it.

    Args:
        path: `module.Class`.
        base: What it must be a subclass of.
        key: Of the recipe, for errors.

    Raises:
        UserError: There is no such class, it is not one of `base`, or it leaves out what `base` demands.
    """
    show = f"Write `{key}: module.Class`, with the module where you start axolotl or installed."
    module_name, _, class_name = path.rpartition(".")
    try:
        with _current_folder_on_path():
            module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise UserError(f"{key}: {path} cannot be imported: {type(error).__name__}: {error}. {show}") from error
    found = getattr(module, class_name, None)
    if found is None:
        raise UserError(f"{key}: {module_name} has no `{class_name}`. {show}")
    if not (isinstance(found, type) and issubclass(found, base)):
        where = base.__module__.removesuffix(".base")
        raise UserError(f"{key}: {path} is not a subclass of {where}.{base.__name__}. Make it one.")
    missing: frozenset[str] = getattr(found, "__abstractmethods__", frozenset())
    if missing:
        raise UserError(f"{key}: {path} leaves out {', '.join(f'`{name}`' for name in sorted(missing))}. Write that.")
    return found


def source_file(found: type) -> Path | None:
    """The file that a class is written in; `None` if there is none to be found."""
    try:
        file = inspect.getsourcefile(found)
    except (ValueError, TypeError, OSError):
        return None
    return None if file is None else Path(file)


@contextmanager
def _current_folder_on_path() -> Iterator[None]:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
