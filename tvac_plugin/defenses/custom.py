"""Defenses written outside this package, named in a recipe by their import path."""

from __future__ import annotations

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.boundary.imported import import_class
from tvac_plugin.configs.base import DefenseConfig
from tvac_plugin.defenses.base import Defense


def import_defense(path: str) -> type[Defense]:
    """Imports the defense at `path`, looking in the current folder too; importing a module runs it.

    Raises:
        UserError: There is no such class, or it is not a defense with settings of its own.
    """
    found = import_class(path, Defense, key="safety_defense")
    config_class = getattr(found, "config_class", None)
    if not (isinstance(config_class, type) and issubclass(config_class, DefenseConfig)):
        raise UserError(f"safety_defense: {path} has no `config_class`. Set it to a subclass of DefenseConfig.")
    if "config_class" not in vars(found) or config_class.block != DefenseConfig.block:
        raise UserError(
            f"safety_defense: {path} shares its `config_class` with another defense. Give it one of its own, a direct "
            "subclass of DefenseConfig."
        )
    return found


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
