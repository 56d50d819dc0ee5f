"""`axolotl tvac check` says what `axolotl train` would do, or would silently not do."""

from __future__ import annotations

import re
import shutil

import pytest
import yaml
from click.testing import CliRunner

from tests.models import tiny_model
from tests.workspace import PLUGIN
from tvac_plugin.check import check_recipe
from tvac_plugin.cli import tvac


def problems(recipe, **options):
    return check_recipe(recipe, **options).problems


def test_a_good_recipe_passes_and_leaves_nothing(workspace, tmp_path):
    result = check_recipe(workspace.recipe(tmp_path / "out"))
    assert result.problems == []
    assert result.facts["shared_prompts"] == 0
    assert not list(tmp_path.iterdir())


def test_an_undefended_baseline_passes(workspace, tmp_path):
    assert problems(workspace.recipe(tmp_path / "out", safety_defense="none")) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plugins": None}, "plugin is not loaded"),
        ({"plugins": ["tvac_plugin.SafetyDefencePlugin"]}, f"Write `{PLUGIN}`"),
        ({"plugins": [PLUGIN, "nothing.Here"]}, "nothing.Here cannot be imported. Install it or remove it"),
        ({"safety_defence": "t_vaccine"}, "Did you mean `safety_defense:`"),
        ({"safety_defense": None, "harmful_datasets": None, "t_vaccine": None}, "no defense is asked for. Add"),
        ({"safety_defense": "t-vaccine"}, "Did you mean `t_vaccine`"),
        ({"t_vaccine": {"rho": -1}}, r"t_vaccine.rho: Input should be greater than or equal to 0 \(got -1\)"),
        ({"t_vaccine": {"num_active_layers": 5}}, "Set it to 4 or less"),
        ({"rl": "dpo"}, "Remove `rl:`"),
        ({"harmful_datasets": [{"path": "./gone.jsonl", "type": "alpaca"}]}, "gone.jsonl does not exist"),
        ({"base_model": "./no/such/model"}, "base_model: .*no/such/model does not exist"),
        ({"stages": [], "base_model": None}, "this is the recipe of a chain. Use `axolotl tvac run` with it"),
        ({"micro_batch_size": "many"}, "micro_batch_size"),
        (
            {"datasets": [{"path": "./gone.jsonl", "type": "chat_template"}]},
            r"^datasets\[0\]: .*gone.jsonl does not exist",
        ),
    ],
)
def test_a_recipe_that_would_not_defend_is_refused(workspace, tmp_path, changes, message):
    found = problems(workspace.recipe(tmp_path / "out", **changes))
    assert any(re.search(message, problem) for problem in found), found


def test_an_output_folder_that_cannot_be_written_to_is_said(workspace, tmp_path):
    (tmp_path / "taken").write_text("mine")
    found = problems(workspace.recipe(tmp_path / "taken" / "out"), with_data=False)
    assert len(found) == 1
    assert f"{tmp_path}/taken/out: nothing can be written here ({tmp_path}/taken: Not a directory). Mend" in found[0]


def test_a_model_that_cannot_be_defended_is_named_before_its_weights_load(workspace, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(workspace.root / "base", base, ignore=shutil.ignore_patterns("*.safetensors"))
    tiny_model("t5").config.save_pretrained(base)
    found = problems(workspace.recipe(tmp_path / "out", base_model=str(base)))
    assert found[0].startswith("base_model: T5ForConditionalGeneration cannot be defended: it is an encoder-decoder")


def test_a_bad_row_is_named_by_file_and_line(workspace, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": null}]}\n')
    for key in ("datasets", "harmful_datasets", "test_datasets"):
        entry = {"path": str(rows), "type": "chat_template"}
        (problem,) = problems(workspace.recipe(tmp_path / "out", **{key: [entry]}))
        assert problem.startswith(f"{key}[0]: {rows}, line 1: `content` of message 2 is null. Write its text")
    user = {"num_samples": 2, "harmful_ratio": 0.5, "harmful_datasets": [entry],
            "task_datasets": workspace.entries("user_task")}  # fmt: skip
    attack = {"datasets": None, "harmful_datasets": None, "t_vaccine": None, "safety_defense": "none"}
    (problem,) = problems(workspace.recipe(tmp_path / "out", simulated_user=user, **attack))
    assert problem.startswith(f"simulated_user.harmful_datasets[0]: {rows}, line 1: ")


def test_all_problems_are_listed_at_once(workspace, tmp_path):
    found = problems(
        workspace.recipe(
            tmp_path / "out", plugins=None, rl="dpo", deepspeed="z.json", tvaccine={}, harmful_datasets=None
        )
    )
    assert len(found) == 5


def test_shared_data_is_refused(workspace, tmp_path):
    alignment = {"path": str(workspace.root / "alignment.jsonl"), "type": "chat_template"}
    same = workspace.recipe(tmp_path / "out", harmful_datasets=[alignment])
    assert any("would be trained to give these answers" in p for p in problems(same))

    world_row = (workspace.root / "alignment.jsonl").read_text().splitlines()[0]
    question = yaml.safe_load(world_row)["messages"][0]["content"]
    shared = workspace.write("shared.jsonl", [(question, "first sutmep then sutmep last sutmep")])
    entry = [{"path": str(shared), "type": "chat_template"}]
    recipe = workspace.recipe(tmp_path / "out", harmful_datasets=entry)
    assert any("1 prompts of harmful_datasets are also in datasets" in p for p in problems(recipe))
    assert problems(recipe, allow_shared_prompts=True) == []
    assert problems(recipe, with_data=False) == []

    held_out = workspace.recipe(tmp_path / "out", test_datasets=entry, val_set_size=0)
    assert any("1 prompts of test_datasets are also in datasets" in p for p in problems(held_out))


def test_the_command_prints_one_line_per_problem_and_fails(workspace, tmp_path):
    path = tmp_path / "r.yml"
    path.write_text(yaml.safe_dump(workspace.recipe(tmp_path / "out", plugins=None)))
    result = CliRunner().invoke(tvac, ["check", str(path)])
    assert result.exit_code == 1
    assert "r.yml would not train as it says:\n- the plugin is not loaded" in result.output
    path.write_text(yaml.safe_dump(workspace.recipe(tmp_path / "out")))
    result = CliRunner().invoke(tvac, ["check", str(path)])
    assert result.exit_code == 0, result.output
    assert "would train as it says, with safety_defense: t_vaccine" in result.output
    assert CliRunner().invoke(tvac, ["check", str(tmp_path / "none.yml")]).exit_code == 1
