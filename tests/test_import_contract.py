"""The import contract of `pyproject.toml` holds, and breaks on an import that it forbids."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINT = Path(sys.executable).parent / "lint-imports"


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        (None, "", None),
        ("defenses/t_vaccine.py", "from tvac_plugin.trainers import sft", "What stands lower"),
        ("new_room.py", "", "What stands lower"),
        ("trainers/reduction.py", "from tvac_plugin.trainers import mixin", "No circles"),
        ("chain/cells.py", "import axolotl", "Axolotl is imported only"),
    ],
)
def test_a_forbidden_import_breaks_the_contract(tmp_path, module, line, broken):
    shutil.copytree(ROOT / "tvac_plugin", tmp_path / "tvac_plugin", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    if module is not None:
        with (tmp_path / "tvac_plugin" / module).open("a") as file:
            file.write(f"\n{line}\n")
    done = subprocess.run(
        [LINT, "--no-logo", "--no-cache"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == (broken is not None), done.stdout + done.stderr
    kept = [text for text in done.stdout.split("\n\n") if "BROKEN" in text]
    assert bool(kept) == (broken is not None)
    if broken is not None:
        said = " ".join(done.stdout.split())
        assert broken in said.split("Broken contracts" if "Broken contracts" in said else "Could not")[-1]
