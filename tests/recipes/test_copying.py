"""`axolotl tvac recipes` copies what the package came with."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from tvac_plugin.cli import tvac

ROOT = Path(__file__).parent.parent.parent
RECIPES = {path.relative_to(ROOT / "recipes").as_posix(): path for path in (ROOT / "recipes").rglob("*.*")}


def test_all_recipes_are_copied_and_none_is_overwritten_unasked(tmp_path):
    result = CliRunner().invoke(tvac, ["recipes", "--output", str(tmp_path / "mine")])
    assert result.exit_code == 0, result.output
    assert f"{len(RECIPES)} files written" in result.output
    for name, path in RECIPES.items():
        assert (tmp_path / "mine" / name).read_text() == path.read_text()
    (tmp_path / "mine" / "chain_tiny.yml").write_text("changed")
    again = CliRunner().invoke(tvac, ["recipes", "--output", str(tmp_path / "mine")])
    assert again.exit_code == 1
    assert "chain_tiny.yml" in again.output
    assert (tmp_path / "mine" / "chain_tiny.yml").read_text() == "changed"
    CliRunner().invoke(tvac, ["recipes", "--output", str(tmp_path / "mine"), "--overwrite"])
    assert (tmp_path / "mine" / "chain_tiny.yml").read_text() == RECIPES["chain_tiny.yml"].read_text()


@pytest.mark.slow
def test_a_wheel_has_the_recipes(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tvac_plugin", "recipes", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        subprocess.run(["cp", "-a", ROOT / name, source / name], check=True)
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path]
    subprocess.run([sys.executable, "-m", "pip", "wheel", source, *options], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = zipfile.ZipFile(wheel).namelist()
    assert {f"tvac_plugin/recipes/shipped/{name}" for name in RECIPES} <= set(packed)
