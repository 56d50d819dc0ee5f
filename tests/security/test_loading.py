"""Loading a model, a judge or a data set runs no code that came with it, unless the recipe says so."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

import tvac_plugin
from tvac_plugin.cli import tvac
from tvac_plugin.evaluation.judges import load_judge
from tvac_plugin.evaluation.recipe import EvaluateRecipe

PACKAGE = Path(tvac_plugin.__file__).parent
CODE = "from pathlib import Path\nPath({mark!r}).touch()\nfrom transformers import PretrainedConfig\n" + (
    "class OwnConfig(PretrainedConfig):\n    model_type = 'own'\n"
)


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def mark(tmp_path):
    return tmp_path / "ran"


@pytest.fixture
def with_code(workspace, tmp_path, mark):
    """A model that brings code of its own."""
    folder = tmp_path / "with_code"
    shutil.copytree(workspace.root / "base", folder)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "own"}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    return folder


def asked(workspace, tmp_path, model, **changes):
    prompts = {"path": str(workspace.root / "held_out.jsonl"), "num_prompts": 1}
    measure = {"judge": "keyword", "prompts": prompts, "max_new_tokens": 1}
    return {"models": {"m": str(model)}, "harmful_score": measure, "output_dir": str(tmp_path / "out")} | changes


def evaluated(tmp_path, recipe):
    (tmp_path / "e.yml").write_text(yaml.safe_dump(recipe))
    return CliRunner().invoke(tvac, ["evaluate", str(tmp_path / "e.yml")])


def test_a_model_s_own_code_does_not_run_in_an_evaluation(workspace, tmp_path, with_code, mark):
    result = evaluated(tmp_path, asked(workspace, tmp_path, with_code))
    assert result.exit_code == 1
    assert "models.m:" in result.output
    assert "set `trust_remote_code: true` in this recipe" in result.output
    assert not mark.exists()


def test_the_recipe_s_key_lets_it_run(workspace, tmp_path, with_code, mark):
    evaluated(tmp_path, asked(workspace, tmp_path, with_code, trust_remote_code=True))
    assert mark.exists()


def test_an_adapter_cannot_bring_code_through_its_base(workspace, tmp_path, with_code, mark):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(with_code)}))
    result = evaluated(tmp_path, asked(workspace, tmp_path, adapter))
    assert "set `trust_remote_code: true`" in result.output
    assert not mark.exists()


@pytest.mark.parametrize("judge", ["beaver_dam", "deberta", "llama_guard", "wildguard"])
def test_a_judge_s_own_code_does_not_run(with_code, mark, judge):
    with pytest.raises(ValueError, match="brings Python code of its own"):
        load_judge(judge, weights=str(with_code))
    assert not mark.exists()


def test_check_follows_the_training_recipe(workspace, tmp_path, with_code, mark):
    recipe = workspace.recipe(tmp_path / "out", base_model=str(with_code))
    (tmp_path / "r.yml").write_text(yaml.safe_dump(recipe))
    result = CliRunner().invoke(tvac, ["check", str(tmp_path / "r.yml")])
    assert result.exit_code == 1
    assert not mark.exists()


def test_a_data_set_with_a_script_is_not_run(workspace, tmp_path, mark):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "rows.py").write_text(CODE.format(mark=str(mark)))
    measure = {"judge": "keyword", "prompts": {"path": str(tmp_path / "rows")}}
    result = evaluated(tmp_path, asked(workspace, tmp_path, workspace.root / "base", harmful_score=measure))
    assert result.exit_code == 1
    assert "prompts:" in result.output
    assert isinstance(result.exception, SystemExit)
    assert not mark.exists()


def test_pickled_weights_run_nothing(workspace, tmp_path, mark):
    model = tmp_path / "model"
    shutil.copytree(workspace.root / "base", model)
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(mark)))
    result = evaluated(tmp_path, asked(workspace, tmp_path, model))
    assert result.exit_code == 1
    assert "models.m:" in result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert not mark.exists()


def test_a_pickled_adapter_runs_nothing(workspace, tmp_path, mark):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"base_model_name_or_path": str(workspace.root / "base"), "peft_type": "LORA", "r": 2,
              "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Payload(mark)))
    result = evaluated(tmp_path, asked(workspace, tmp_path, adapter))
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), result.exception
    assert not mark.exists()


def test_lox_neither_reads_nor_copies_pickles(workspace, tmp_path, mark):
    base, aligned = (tmp_path / name for name in ("base", "aligned"))
    for folder in (base, aligned):
        shutil.copytree(workspace.root / "base", folder)
        for name in ("training_args.bin", "optimizer.pt", "rng_state.pth", "notes.pkl"):
            (folder / name).write_bytes(pickle.dumps(Payload(mark)))
    from safetensors.torch import load_file, save_file

    weights = load_file(aligned / "model.safetensors")
    save_file({name: w * 1.5 for name, w in weights.items()}, aligned / "model.safetensors", {"format": "pt"})
    options = ["--aligned", aligned, "--base", base, "--output", tmp_path / "out"]
    result = CliRunner().invoke(tvac, ["lox", *map(str, options)])
    assert result.exit_code == 0, result.output
    assert not {path.suffix for path in (tmp_path / "out").iterdir()} & {".bin", ".pt", ".pth", ".pkl"}
    assert not mark.exists()


def test_the_package_has_no_pickle_and_trusts_no_code_by_itself():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"} & set(names), path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "save"), ("torch", "load")}, path
            if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
                assert (node.arg, node.value.value) not in {("trust_remote_code", True), ("shell", True)}, path


def test_a_defense_of_one_s_own_is_announced_before_it_is_imported(workspace, tmp_path, monkeypatch, mark):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "leaves_early.py").write_text(
        f"from pathlib import Path\nPath({str(mark)!r}).touch()\nraise SystemExit(0)\n"
    )
    recipe = workspace.recipe(tmp_path / "out", safety_defense="leaves_early.Defense", t_vaccine=None)
    (tmp_path / "r.yml").write_text(yaml.safe_dump(recipe))
    result = CliRunner().invoke(tvac, ["check", "r.yml"])
    assert "safety_defense: leaves_early.Defense is imported, which runs its code." in result.stderr
    assert result.exit_code == 1, "a module that exits is no defense"
    assert "cannot be imported: SystemExit" in result.output
    assert mark.exists()


@pytest.mark.parametrize("path", ["os.system", "builtins.exec", "subprocess.Popen", "os.path", ".system", "os."])
def test_what_is_no_defense_is_refused(workspace, tmp_path, path):
    (tmp_path / "r.yml").write_text(yaml.safe_dump(workspace.recipe(tmp_path, safety_defense=path, t_vaccine=None)))
    result = CliRunner().invoke(tvac, ["check", str(tmp_path / "r.yml"), "--no-data"])
    assert result.exit_code == 1
    assert f"safety_defense: {path}" in result.output or "safety_defense: os has no" in result.output


def test_a_recipe_without_foreign_code_is_not_announced(workspace, tmp_path):
    from tvac_plugin.recipes.reading import foreign_code

    assert foreign_code(workspace.recipe(tmp_path)) == []
    assert foreign_code({"trust_remote_code": True, "plugins": ["a.B", "axolotl.integrations.liger.LigerPlugin"]}) == [
        "plugins: a.B is imported, which runs its code.",
        "trust_remote_code: Python code that comes with the model or its tokenizer runs.",
    ]
    assert EvaluateRecipe.model_fields["trust_remote_code"].default is False
