"""Arms with an extrapolated alignment, two jobs at a time, with the real commands and a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow


def write_chain(workspace, folder):
    align = workspace.recipe(folder / "unused", max_steps=2)
    attack = {key: value for key, value in align.items() if key not in ("datasets", "harmful_datasets", "t_vaccine")}
    user = {"num_samples": 10, "harmful_ratio": 0.2, "task_datasets": workspace.entries("user_task"),
            "harmful_datasets": workspace.entries("user_harmful")}  # fmt: skip
    prompts = {"path": str(workspace.root / "held_out.jsonl"), "num_prompts": 4}
    recipes = {
        "align": align,
        "attack": attack | {"safety_defense": "none", "simulated_user": user},
        "judge": {
            "harmful_score": {"judge": "keyword", "prompts": prompts, "max_new_tokens": 4},
            "output_dir": "-",
            "max_unscored": 0.9,  # a model with random weights may say nothing
        },
        "chain": {
            "stages": [
                {"name": "align", "train": "align.yml"},
                {"name": "extrapolate", "lox": {"rank": 1, "coefficient": 0}, "model_from": "align"},
                {"name": "attack", "train": "attack.yml", "model_from": "extrapolate"},
                {"name": "judge", "evaluate": "judge.yml", "models": ["extrapolate", "attack"]},
            ],
            "arms": [{"safety_defense": "none"}, {"safety_defense": "t_vaccine", "extrapolate.coefficient": 1.25}],
            "output_dir": str(folder / "out"),
        },
    }
    for name, recipe in recipes.items():
        (folder / f"{name}.yml").write_text(yaml.safe_dump(recipe))
    return folder / "chain.yml"


def test_arms_run_to_their_end(workspace, tmp_path):
    bin_folder = Path(sys.executable).parent
    result = subprocess.run(
        [bin_folder / "axolotl", "tvac", "run", write_chain(workspace, tmp_path), "--jobs", "2"], cwd=tmp_path,
        capture_output=True, text=True, timeout=580, check=False,
        env=os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    none, both = results["cells"]
    assert (none["defenses"], both["defenses"]) == ({}, {"align": "t_vaccine", "extrapolate": "lox"})
    lox = results["jobs"]["extrapolate-safety_defense=t_vaccine-extrapolate.coefficient=1.25"]
    assert lox["safety_defense"]["lox"]["coefficient"] == 1.25
    assert "t_vaccine + extrapolate.coefficient=1.25" in result.stdout
