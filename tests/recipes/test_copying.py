"""`axolotl tvac recipes` copies what the package came with."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from tvac_plugin.cli import tvac
from tvac_plugin.recipes.copying import SCHEMA
from tvac_plugin.recipes.reading import read_recipe

ROOT = Path(__file__).parent.parent.parent
RECIPES = {path.relative_to(ROOT / "recipes").as_posix(): path for path in (ROOT / "recipes").rglob("*.*")}
RECIPES.pop(SCHEMA, None)
SHIPPED = "tvac_plugin/recipes/shipped/"
TRAINING = [path for path in RECIPES.values() if path.suffix == ".yml" and "base_model" in read_recipe(path)]


def test_all_recipes_are_copied_and_none_is_overwritten_unasked(tmp_path):
    result = CliRunner().invoke(tvac, ["recipes", "--output", str(tmp_path / "mine")])
    assert result.exit_code == 0, result.output
    assert f"{len(RECIPES) + 1} files written" in result.output
    for name, path in RECIPES.items():
        assert (tmp_path / "mine" / name).read_text() == path.read_text()
    (tmp_path / "mine" / "chain_tiny.yml").write_text("changed")
    again = CliRunner().invoke(tvac, ["recipes", "--output", str(tmp_path / "mine")])
    assert again.exit_code == 1
    assert "chain_tiny.yml" in again.output
    assert (tmp_path / "mine" / "chain_tiny.yml").read_text() == "changed"
    CliRunner().invoke(tvac, ["recipes", "--output", str(tmp_path / "mine"), "--overwrite"])
    assert (tmp_path / "mine" / "chain_tiny.yml").read_text() == RECIPES["chain_tiny.yml"].read_text()


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_the_first_line_of_a_training_recipe_leads_an_editor_to_the_schema_that_is_written_beside_it(path):
    (named,) = re.findall(r"^# yaml-language-server: \$schema=(\S+)$", path.read_text().splitlines()[0])
    assert (path.parent / named).resolve() == ROOT / "recipes" / SCHEMA


def test_the_schema_is_that_of_the_installed_axolotl(tmp_path):
    CliRunner().invoke(tvac, ["recipes", "--output", str(tmp_path)])
    CliRunner().invoke(tvac, ["schema", "--merged", "--output", str(tmp_path / "again.json")])
    schema = json.loads((tmp_path / SCHEMA).read_text())
    assert schema == json.loads((tmp_path / "again.json").read_text())
    assert {"safety_defense", "gradient_accumulation_steps"} <= schema["properties"].keys()


def test_without_axolotl_there_is_no_schema_and_the_recipes_are_copied(tmp_path, monkeypatch):
    monkeypatch.setattr("tvac_plugin.recipes.copying.find_spec", lambda _name: None)
    result = CliRunner().invoke(tvac, ["recipes", "--output", str(tmp_path)])
    assert f"{len(RECIPES)} files written" in result.output
    assert not (tmp_path / SCHEMA).exists()


@pytest.mark.slow
def test_a_wheel_has_the_recipes(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tvac_plugin", "recipes", "pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"):
        subprocess.run(["cp", "-a", ROOT / name, source / name], check=True)
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path]
    subprocess.run([sys.executable, "-m", "pip", "wheel", source, *options], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = zipfile.ZipFile(wheel).namelist()
    shipped = {name.removeprefix(SHIPPED) for name in packed if name.startswith(SHIPPED)}
    assert shipped == RECIPES.keys()
