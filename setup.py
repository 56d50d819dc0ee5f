"""Puts the repository's `recipes/` into a built package; everything else is in `pyproject.toml`."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithRecipes(build_py):
    """Builds the package, and copies the recipes to where `tvac_plugin.recipes.copying` looks for them."""

    def run(self) -> None:
        """An editable installation has the repository's folder beside it, so nothing is copied there."""
        super().run()
        if not self.editable_mode:
            shipped = Path(self.build_lib) / "tvac_plugin" / "recipes" / "shipped"
            shutil.copytree("recipes", shipped, ignore=shutil.ignore_patterns("schema.json"), dirs_exist_ok=True)


setup(cmdclass={"build_py": WithRecipes})
