"""The recipes that come with the package: `setup.py` copies the repository's `recipes/` to `shipped` in a build."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.boundary.files import write_all
from tvac_plugin.recipes.schema import recipe_schema

SCHEMA = "schema.json"
"""What the first lines of training recipes name to editors. It is of the installed Axolotl, so it is not shipped."""

_BUILT = Path(__file__).parent / "shipped"
_SHIPPED = _BUILT if _BUILT.is_dir() else Path(__file__).parents[2] / "recipes"
_SUFFIXES = (".yml", ".json", ".md")


def copy_recipes(folder: Path, *, overwrite: bool = False) -> list[Path]:
    """Copies all recipes and what comes with them, and writes their schema for editors if Axolotl is installed.

    Returns:
        Where they are now.

    Raises:
        UserError: The package came without them, a file is there already, or nothing can be written.
    """
    paths = sorted(path for path in _SHIPPED.rglob("*") if path.suffix in _SUFFIXES)
    if not paths:
        raise UserError(f"{_SHIPPED}: this installation has no recipes. Install the package again.")
    files = {path.relative_to(_SHIPPED).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    files.pop(SCHEMA, None)  # of the Axolotl with which somebody wrote it
    if find_spec("axolotl") is not None:
        files[SCHEMA] = json.dumps(recipe_schema(), indent=2) + "\n"
    write_all(folder, files, overwrite=overwrite)
    return [folder / name for name in files]
