"""The recipes that come with the package: `shipped` links to the repository's `recipes/`, a folder once built."""

from __future__ import annotations

from pathlib import Path

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.boundary.files import write_all

_SHIPPED = Path(__file__).parent / "shipped"
_SUFFIXES = (".yml", ".json")


def copy_recipes(folder: Path, *, overwrite: bool = False) -> list[Path]:
    """Copies all recipes, and the shapes that come with them; returns where they are now.

    Raises:
        UserError: The package came without them, a file is there already, or nothing can be written.
    """
    names = sorted(path for path in _SHIPPED.resolve().rglob("*") if path.suffix in _SUFFIXES)
    if not names:
        raise UserError(f"{_SHIPPED}: this installation has no recipes. Install the package again.")
    files = {path.relative_to(_SHIPPED.resolve()).as_posix(): path.read_text(encoding="utf-8") for path in names}
    write_all(folder, files, overwrite=overwrite)
    return [folder / name for name in files]
