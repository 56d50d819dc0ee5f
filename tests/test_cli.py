"""The real commands in real processes, as a user runs them. Each costs seconds of imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.workspace import PLUGIN
from tvac_plugin.provenance.manifest import verify

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent


def axolotl(*arguments, cwd, stdin=""):
    result = subprocess.run(
        [BIN / "axolotl", *map(str, arguments)],
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"},
    )
    return result.returncode, result.stdout + result.stderr


def write(recipe, folder):
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def trained(workspace, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    recipe = write(workspace.recipe(folder / "out", val_set_size=0.2, eval_steps=2, save_strategy=None), folder)
    code, output = axolotl("train", recipe, cwd=folder)
    assert code == 0, output
    return recipe, folder / "out"


def test_train_is_defended_and_verifies(trained):
    recipe, output = trained
    assert verify(output, defense="t_vaccine")["defended_steps"] == 4
    code, printed = axolotl("tvac", "verify", output, "--defense", "t_vaccine", cwd=recipe.parent)
    assert code == 0, printed
    assert "t_vaccine: 4 of 4 batches defended (all), in 4 of 4 steps" in printed


def test_merge_lora_works_on_the_result(trained):
    recipe, output = trained
    code, printed = axolotl("merge-lora", recipe, "--lora-model-dir", output, cwd=recipe.parent)
    assert code == 0, printed
    assert (output / "merged" / "model.safetensors").is_file()


def test_inference_works_on_the_result(trained, workspace):
    recipe, output = trained
    question = json.loads((workspace.root / "harmful.jsonl").read_text().splitlines()[0])["messages"][0]["content"]
    code, printed = axolotl(
        "inference", recipe, "--lora-model-dir", output, cwd=recipe.parent, stdin=f"{question}\n\x04"
    )
    assert code == 0, printed
    assert f"<user> {question}" in printed
    assert "<assistant>" in printed


def test_evaluate_works_on_the_result(trained):
    recipe, output = trained
    code, printed = axolotl("evaluate", recipe, "--lora-model-dir", output, cwd=recipe.parent)
    assert code == 0, printed
    assert (output / "eval_summary.csv").is_file()


def test_preprocess_then_train_reuses_the_tokens(workspace, tmp_path):
    recipe = write(workspace.recipe(tmp_path / "out", dataset_prepared_path=str(tmp_path / "prepared")), tmp_path)
    code, printed = axolotl("preprocess", recipe, cwd=tmp_path)
    assert code == 0, printed
    (content,) = (tmp_path / "prepared").iterdir()
    assert len([path for path in content.iterdir() if path.is_dir() and path.name != "rows"]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plugins": ["tvac_plugin.SafetyDefencePlugin"]}, "Did you mean `SafetyDefensePlugin`"),
        ({"safety_defence": "t_vaccine", "safety_defense": None}, "Did you mean `safety_defense:`"),
        ({"t_vaccine": {"num_active_layers": 9}}, "Set it to 4 or less"),
        ({"harmful_datasets": [{"path": "gone.jsonl", "type": "alpaca"}]}, "gone.jsonl does not exist"),
        ({"plugins": ["axolotl.integrations.kd.KDPlugin", PLUGIN], "kd_trainer": True}, "brings its own trainer"),
    ],
)
def test_a_mistake_ends_train_with_one_sentence(workspace, tmp_path, changes, message):
    code, printed = axolotl("train", write(workspace.recipe(tmp_path / "out", **changes), tmp_path), cwd=tmp_path)
    assert code != 0
    assert message in printed
    assert not list((tmp_path / "out").glob("*safe*"))


def test_a_plugin_that_axolotl_skips_is_caught_by_check_and_by_verify(workspace, tmp_path):
    recipe = write(workspace.recipe(tmp_path / "out", plugins=["tvac_plugins.SafetyDefensePlugin"]), tmp_path)
    code, printed = axolotl("tvac", "check", recipe, cwd=tmp_path)
    assert code == 1
    assert f"Write `{PLUGIN}`" in printed
    code, _ = axolotl("train", recipe, cwd=tmp_path)
    assert code == 0, "Axolotl trains on; this is why check exists"
    code, printed = axolotl("tvac", "verify", tmp_path / "out", cwd=tmp_path)
    assert code == 1
    assert "nothing shows that this model was defended" in printed
