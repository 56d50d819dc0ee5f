"""`axolotl tvac check` says what `axolotl train` would do, or would silently not do."""

from __future__ import annotations

import re
import shutil

import pytest
import yaml
from click.testing import CliRunner

from tests.support.models import tiny_model
from tests.support.workspace import PLUGIN
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
        ({"plugins": [PLUGIN + "s"]}, "is not this plugin's name"),
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
        ({"stages": [], "base_model": None}, "this is a chain recipe. Use `axolotl tvac run` with it"),
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
    assert f"{tmp_path}/taken/out: nothing can be written here ({tmp_path}/taken: Not a directory). Fix" in found[0]


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
            tmp_path / "out", plugins=[PLUGIN + "s"], rl="dpo", deepspeed="z.json", tvaccine={}, harmful_datasets=None
        )
    )
    assert len(found) == 5


def test_problems_of_keys_files_and_axolotl_s_own_are_listed_together(workspace, tmp_path):
    changes = {"t_vaccine": None, "base_model": "./gone", "micro_batch_size": "many",
               "datasets": [{"path": "./gone.jsonl", "type": "alpaca"}]}  # fmt: skip
    found = problems(workspace.recipe(tmp_path / "out", **changes) | {"t_vaccine": None, "rho": 3.0})
    for part in ("`t_vaccine:` is empty", "`rho:` is a key of `t_vaccine:`", "base_model: ./gone does not exist",
                 "datasets[0]: ./gone.jsonl does not exist", "micro_batch_size: "):  # fmt: skip
        assert sum(part in problem for problem in found) == 1, (part, found)


def test_it_says_what_will_happen(workspace, tmp_path):
    result = check_recipe(workspace.recipe(tmp_path / "out", max_steps=None, num_epochs=2, val_set_size=0.25))
    found = result.outlook
    assert found["settings"] | {"rho": 1.0, "freeze": "layer", "perturb": "attention"} == found["settings"]
    assert (found["rows"], found["rows_held_out"], found["steps"], found["layers"]) == (18, 6, 18, 4)
    assert (found["draws"], found["probes"], found["layers_drawn"]) == (9, 6, 2)
    assert found["a_layer_learns_in"] == "50% of the steps"
    assert found["passes"].startswith("2 forward and backward")


def test_it_counts_the_rows_of_an_attack(workspace, tmp_path):
    user = {"num_samples": 4, "harmful_ratio": 0.5, "harmful_datasets": workspace.entries("user_harmful"),
            "task_datasets": workspace.entries("user_task")}  # fmt: skip
    attack = {"datasets": None, "harmful_datasets": None, "t_vaccine": None, "safety_defense": "none"}
    result = check_recipe(workspace.recipe(tmp_path / "out", simulated_user=user, max_steps=None, **attack))
    assert result.outlook == {"rows": 4, "steps": 20, "layers": 4}


def test_drawing_every_layer_is_warned_of(workspace, tmp_path):
    result = check_recipe(workspace.recipe(tmp_path / "out", t_vaccine={"num_active_layers": 4}))
    assert result.problems == []
    assert result.warnings[0].startswith("t_vaccine.num_active_layers: all 4 layers are drawn")


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "flash_attention_2"},
        {"attn_implementation": None, "flash_attention": True},
        {"tf32": True},
    ],
)
def test_what_ends_in_an_error_without_cuda_is_named(workspace, tmp_path, changes):
    result = check_recipe(workspace.recipe(tmp_path / "out", **changes))
    assert result.problems == []
    (warning,) = result.warnings
    key, value = next((key, value) for key, value in changes.items() if value)
    assert f"`{key}: {str(value).lower() if value is True else value}`: this machine has no CUDA" in warning


@pytest.mark.parametrize("changes", [{"bf16": "auto", "fp16": None}, {"bf16": None, "fp16": None}])
def test_what_is_float16_without_cuda_is_named(workspace, tmp_path, changes):
    (warning,) = check_recipe(workspace.recipe(tmp_path / "out", **changes)).warnings
    assert warning.startswith("`bf16: auto`: without CUDA this means float16. Write `bf16: false` and `fp16: false`")


def test_a_recipe_for_this_machine_has_no_warning(workspace, tmp_path):
    assert check_recipe(workspace.recipe(tmp_path / "out")).warnings == []


@pytest.mark.parametrize(
    ("key", "said"), [("micro_batch_sz", "Did you mean `micro_batch_size`?"), ("zzqq", "Correct or remove it.")]
)
def test_keys_that_axolotl_would_drop_are_named(workspace, tmp_path, key, said):
    result = check_recipe(workspace.recipe(tmp_path / "out", **{key: 2}))
    assert result.problems == []
    (warning,) = result.warnings
    assert warning.startswith(f"`{key}:` is no key of Axolotl's or this plugin's")
    assert warning.endswith(said)


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
    path.write_text(yaml.safe_dump(workspace.recipe(tmp_path / "out", plugins=[PLUGIN + "s"])))
    result = CliRunner().invoke(tvac, ["check", str(path)])
    assert result.exit_code == 1
    assert "r.yml would not train as it says:\n- plugins: `tvac_plugin.SafetyDefensePlugins` is" in result.output
    path.write_text(yaml.safe_dump(workspace.recipe(tmp_path / "out")))
    result = CliRunner().invoke(tvac, ["check", str(path)])
    assert result.exit_code == 0, result.output
    assert "would train as it says, with safety_defense: t_vaccine" in result.output
    assert '"num_active_layers": 2' in result.output
    assert CliRunner().invoke(tvac, ["check", str(tmp_path / "none.yml")]).exit_code == 1
