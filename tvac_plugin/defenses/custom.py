"""Defenses written outside this package, named in a recipe by their import path."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.configs.base import DefenseConfig
from tvac_plugin.defenses.base import Defense

_SHOW = "Write `safety_defense: module.Class`, with the module where you start axolotl or installed."


def import_defense(path: str) -> type[Defense]:
    """Imports the defense at `path`, looking in the current folder too; importing a module runs it.

    Raises:
        UserError: There is no such class, or it is not a defense with settings of its own.
    """
    module_name, _, class_name = path.rpartition(".")
    try:
        with _current_folder_on_path():
            module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise UserError(
            f"safety_defense: {path} cannot be imported: {type(error).__name__}: {error}. {_SHOW}"
        ) from error
    found = getattr(module, class_name, None)
    if found is None:
        raise UserError(f"safety_defense: {module_name} has no `{class_name}`. {_SHOW}")
    if not (isinstance(found, type) and issubclass(found, Defense)):
        raise UserError(f"safety_defense: {path} is not a subclass of tvac_plugin.defenses.Defense. Make it one.")
    config_class = getattr(found, "config_class", None)
    if not (isinstance(config_class, type) and issubclass(config_class, DefenseConfig)):
        raise UserError(f"safety_defense: {path} has no `config_class`. Set it to a subclass of DefenseConfig.")
    if "config_class" not in vars(found) or config_class.block != DefenseConfig.block:
        raise UserError(
            f"safety_defense: {path} shares its `config_class` with another defense. Give it one of its own, a direct "
            "subclass of DefenseConfig."
        )
    return found


def source_file(path: str) -> Path | None:
    """The file that the defense at `path` is written in; `None` if there is none to be found."""
    try:
        found = inspect.getsourcefile(import_defense(path))
    except (ValueError, TypeError, OSError):
        return None
    return None if found is None else Path(found)


def defense_class(config: DefenseConfig) -> type[Defense]:
    """The imported defense whose settings are of the class of `config`.

    Raises:
        UserError: There is none.
    """
    waiting = list(Defense.__subclasses__())
    while waiting:
        candidate = waiting.pop()
        if getattr(candidate, "config_class", None) is type(config):
            return candidate
        waiting += candidate.__subclasses__()
    raise UserError(f"no defense has settings of {type(config).__name__}. Name it in the `config_class` of a Defense.")


@contextmanager
def _current_folder_on_path() -> Iterator[None]:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
