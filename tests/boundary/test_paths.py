"""Names from recipes stay names: nothing is written outside the output folder, and nothing is called after a prompt."""

from __future__ import annotations

import json
import shlex

import pytest
import yaml
from click.testing import CliRunner

from tests.chain import fake
from tests.chain.conftest import STAGES, chain  # noqa: F401 (a fixture)
from tvac_plugin.boundary.errors import printable
from tvac_plugin.boundary.paths import folder_name
from tvac_plugin.cli import tvac
from tvac_plugin.evaluation.evaluate import evaluate
from tvac_plugin.evaluation.recipe import EvaluateRecipe

HOSTILE = [
    "../../escaped", "/tmp/escaped", "..", "x; touch pwned", "$(touch pwned)", "`touch pwned`", "a && touch pwned",
    "--help", "-rf", "x" * 5000, "é" * 200, "a\nb", "\x1b[31mred", "~", "~nobody-here", "*", "'\"", "\u202etxt",
]  # fmt: skip
IMPOSSIBLE_NAMES = ["../x", "/tmp/x", "..", ".hidden", "a\0b", "a\nb", "", " ", "x" * 101, "-rf", "a\\b", "\x1b[31m"]


def files_below(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_folder_names_are_plain_short_and_different():
    names = [folder_name(f"align-{value}") for value in HOSTILE]
    assert len(set(names)) == len(HOSTILE)
    for name in names:
        assert name.startswith("align-")
        assert len(name.encode()) <= 150
        assert shlex.quote(name).strip("'") == name, "no shell would see more than a word"
        assert not set(name) & set("/\\\n\0~*$`;&'\" ")
    assert folder_name("align-safety_defense=t_vaccine-seed=1") == "align-safety_defense=t_vaccine-seed=1"


def test_a_chain_with_hostile_values_stays_in_its_folder(chain, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HOME", str(tmp_path))
    path = chain(matrix={"align.note": HOSTILE}, stages=STAGES[:1])
    before = files_below(tmp_path)
    results = fake.run(path)
    assert {cell["status"] for cell in results["cells"]} == {"finished"}
    assert len(results["jobs"]) == len(HOSTILE)
    assert {name.partition("/")[0] for name in files_below(tmp_path) - before} == {"out"}
    assert {folder.name for folder in (tmp_path / "out" / "jobs").iterdir()} == set(results["jobs"])


@pytest.mark.parametrize("folder", ["x; touch pwned", "$(touch pwned)", "--help", "-rf x", "a\u202eb"])
def test_an_odd_output_folder_is_a_folder(chain, tmp_path, folder):  # noqa: F811
    path = chain(output_dir=folder, stages=STAGES[:1], matrix={})
    before = files_below(tmp_path)
    results = fake.run(path)
    assert results["cells"][0]["status"] == "finished"
    assert {name.partition("/")[0] for name in files_below(tmp_path) - before} == {folder}


@pytest.mark.parametrize("folder", ["", "a\0b", "a\nb"])
def test_an_impossible_output_folder_is_named(chain, folder):  # noqa: F811
    result = CliRunner().invoke(tvac, ["run", str(chain(output_dir=folder))])
    assert result.exit_code == 1
    assert "output_dir: String should" in result.output


def test_printed_commands_can_be_pasted_into_a_shell(chain, tmp_path):  # noqa: F811
    from tvac_plugin.chain.jobs import launcher

    changes = {"output_dir": "x; touch pwned", "stages": STAGES[:1], "matrix": {}}
    command = next(iter(fake.fake_plan(chain(**changes)).jobs.values())).recipe_file
    printed = CliRunner().invoke(tvac, ["run", str(chain(**changes)), "--dry-run"]).output.strip()
    assert shlex.split(printed) == ["axolotl", "train", str(command), f"--launcher={launcher()}"]


def test_a_base_model_that_looks_like_an_option_stays_a_value(chain, monkeypatch):  # noqa: F811
    from tvac_plugin.chain.jobs import ChainPlan
    from tvac_plugin.chain.recipe import read_chain

    lox = {"name": "more", "lox": {"rank": 2}, "model_from": "align"}
    path = chain(stages=[STAGES[0], lox], matrix={}, align={"adapter": None, "base_model": "--coefficient"})
    command = next(job.command for job in ChainPlan(read_chain(path)).jobs.values() if job.kind == "lox")
    given = {}
    monkeypatch.setattr("tvac_plugin.lox.apply_lox", lambda *paths, **options: given.update(options))
    result = CliRunner().invoke(tvac, list(command[1:]))
    assert result.exit_code == 0, result.output
    assert str(given["base"]) == "--coefficient"
    assert (given["rank"], given["coefficient"]) == (2, 1.25)


@pytest.mark.parametrize("name", IMPOSSIBLE_NAMES)
@pytest.mark.parametrize("where", ["models", "accuracy"])
def test_a_model_or_measure_that_files_cannot_be_called_after_is_refused(tmp_path, monkeypatch, name, where):
    monkeypatch.chdir(tmp_path)
    named = {name: "base" if where == "models" else {"prompts": {"path": "p.jsonl"}}}
    recipe = {"models": {"a": "base"}, "accuracy": {"b": {"prompts": {"path": "p.jsonl"}}}, "output_dir": "out"}
    (tmp_path / "e.yml").write_text(yaml.safe_dump(recipe | {where: named}))
    result = CliRunner().invoke(tvac, ["evaluate", "e.yml"])
    assert result.exit_code == 1
    assert "cannot be a name" in result.output
    assert files_below(tmp_path) == {"e.yml"}


def test_a_model_named_on_the_command_line_is_held_to_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = {"accuracy": {"b": {"prompts": {"path": "p.jsonl"}}}, "output_dir": "out"}
    (tmp_path / "e.yml").write_text(yaml.safe_dump(recipe))
    result = CliRunner().invoke(tvac, ["evaluate", "e.yml", "--model", f"{tmp_path}/escaped=base"])
    assert result.exit_code == 1
    assert "cannot be a name" in result.output


@pytest.mark.parametrize("name", ["harmful_score", "a.harmful_score"])
def test_a_measure_cannot_overwrite_another_one_s_answers(name):
    with pytest.raises(ValueError, match="cannot be told from other measures"):
        EvaluateRecipe.model_validate({"accuracy": {name: {"prompts": {"path": "p"}}}, "output_dir": "o"})


def test_prompts_do_not_become_file_names(workspace, tmp_path):
    workspace.write("hostile.jsonl", [(text, text) for text in HOSTILE if text.isprintable()])
    prompts = {"path": str(workspace.root / "hostile.jsonl")}
    evaluate(EvaluateRecipe.model_validate({
        "models": {"base": str(workspace.root / "base")}, "output_dir": str(tmp_path / "out"),
        "harmful_score": {"judge": "keyword", "prompts": prompts, "max_new_tokens": 1}, "max_unscored": 1.0,
    }))  # fmt: skip
    assert files_below(tmp_path) == {"out/evaluation.json", "out/answers/base.harmful_score.jsonl"}
    lines = (tmp_path / "out" / "answers" / "base.harmful_score.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["prompt"] == "../../escaped"


@pytest.mark.parametrize("value", ["a\0b", "x" * 5000, "~nobody-here/x", "./" + "y" * 300])
def test_a_path_that_cannot_be_is_a_sentence(chain, workspace, tmp_path, value):  # noqa: F811
    from tvac_plugin.check import check_recipe

    recipe = workspace.recipe(tmp_path / "out", base_model=value)
    assert any("base_model" in problem for problem in check_recipe(recipe).problems)
    for changes in ({"align": {"base_model": value}}, {"align": {"datasets": [{"path": value}]}}):
        result = CliRunner().invoke(tvac, ["run", str(chain(**changes))])
        assert result.exit_code == 1
        assert isinstance(result.exception, SystemExit), result.exception
        assert "does not exist" in result.output


def test_a_failed_job_s_last_words_cannot_move_the_cursor(chain):  # noqa: F811
    said = []
    fake.run(chain(align={"fail": True, "note": "x"}, stages=STAGES[:1], matrix={}), say=said.append)
    assert printable("\x1b[2Jgone\rX\u202e") == "\ufffd[2Jgone\ufffdX\ufffd"
    assert all(line == printable(line) for line in said)


def test_a_folder_above_the_chain_or_a_home_is_not_read_whole(chain, tmp_path, monkeypatch):  # noqa: F811
    from tvac_plugin.chain.state import _local_files

    (tmp_path / "home").mkdir()
    for number in range(1001):
        (tmp_path / "home" / str(number)).touch()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    plan = fake.fake_plan(chain(align={"note": "/", "other": str(tmp_path), "third": ".", "fourth": "~"}, matrix={}))
    job = next(job for job in plan.jobs.values() if job.kind == "train")
    assert set(_local_files(job)) == {"alignment.jsonl"}


@pytest.mark.parametrize("files", [["world.json"], ["world.json", "thesis.tex"]])
def test_a_folder_that_only_looks_like_a_tiny_world_is_left_alone(tmp_path, files):
    for name in files:
        (tmp_path / name).write_text("{}")
    result = CliRunner().invoke(tvac, ["tiny-world", "--output", str(tmp_path)])
    assert result.exit_code == 1
    assert "is not a world" in result.output
    assert {path.name for path in tmp_path.iterdir()} == set(files)
