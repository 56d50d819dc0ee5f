"""Every package that the code imports is one that it asks for."""

from __future__ import annotations

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ONLY_WITH = {"axolotl": "axolotl", "bitsandbytes": "axolotl", "lm-eval": "axolotl", "optuna": "search"}
"""The extra that brings a package, by its name."""


def names(requirements):
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def imported():
    modules = set()
    for path in (ROOT / "tvac_plugin").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules.add(node.module.partition(".")[0])
    return sorted(modules - sys.stdlib_module_names - {"tvac_plugin"})


@pytest.mark.parametrize("module", imported())
def test_what_is_imported_is_declared(module):
    homes = {canonicalize_name(name) for name in packages_distributions()[module]}
    extra = next((ONLY_WITH[home] for home in homes if home in ONLY_WITH), None)
    assert homes & names(PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra])


def test_the_imports_are_found():
    assert {"torch", "yaml", "jinja2", "scipy", "lm_eval"} <= set(imported())
