"""`axolotl tvac init` turns a recipe that somebody has into a chain that can run."""

from __future__ import annotations

import difflib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from tests.starter.conftest import SHAPES
from tvac_plugin.boundary.errors import UserError
from tvac_plugin.chain.jobs import ChainPlan
from tvac_plugin.chain.preflight import plan_problems
from tvac_plugin.chain.recipe import read_chain
from tvac_plugin.check import check_recipe
from tvac_plugin.cli import tvac
from tvac_plugin.evaluation.prompts import load_prompts
from tvac_plugin.evaluation.recipe import EvaluateRecipe
from tvac_plugin.provenance.manifest import verify
from tvac_plugin.recipes.reading import read_recipe
from tvac_plugin.starter.material import Given
from tvac_plugin.starter.writing import start_chain

HARMFUL = Path("ws/harmful.jsonl")


def questions(path):
    found = []
    for line in Path(path).read_text().splitlines():
        row = json.loads(line)
        found.append(row["messages"][0]["content"] if "messages" in row else row["instruction"])
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_written_passes_check_and_the_chain_s_preflight(desk, shape):
    started = start_chain(desk / f"{shape}.yml", Given(HARMFUL, judge="answers"))
    folder = started.chain.parent
    assert folder == desk / f"{shape}_defended"
    assert started.missing == []
    align = read_recipe(folder / "align.yml")
    assert align["safety_defense"] == "t_vaccine"
    assert check_recipe(align).problems == []
    attack = read_recipe(folder / "attack.yml") | {"base_model": "ws/base"}
    result = check_recipe(attack)
    assert result.problems == []
    assert result.facts["harmful_datasets"]["rows"] >= 1
    assert plan_problems(ChainPlan(read_chain(started.chain))) == []


@pytest.mark.parametrize("shape", SHAPES)
def test_the_user_s_lines_comments_and_order_stay(desk, shape):
    start_chain(desk / f"{shape}.yml", Given(HARMFUL))
    written = (desk / f"{shape}_defended" / "align.yml").read_text()
    lines = list(difflib.ndiff(SHAPES[shape].splitlines(), written[written.index("base_model:") :].splitlines()))
    lost = [line[2:].split()[0].rstrip(":") for line in lines if line.startswith("- ") and line[2:].strip()]
    assert (
        lost
        == {"lora": ["#", "output_dir"], "qlora": ["output_dir", "hub_model_id"], "full": ["-", "output_dir"]}[shape]
    )
    for comment in ("# my recipe: alpaca and LoRA", "# small", "# hub_model_id", "# where it goes", "# saved once"):
        assert (comment in written) == (comment in SHAPES[shape])
    original = yaml.safe_load(SHAPES[shape])
    kept = {key: value for key, value in yaml.safe_load(written).items() if key in original}
    for key in original.keys() - {"datasets", "output_dir", "plugins", "hub_model_id"}:
        assert kept[key] == original[key]
    assert "hub_model_id" not in kept


def test_the_attack_keeps_the_comments_around_the_data_it_replaces(desk):
    start_chain(desk / "qlora.yml", Given(HARMFUL))
    written = (desk / "qlora_defended" / "attack.yml").read_text()
    for comment in ("# where it goes", "# saved once", "# the end"):
        assert comment in written
    assert "\ndatasets:" not in written


@pytest.mark.parametrize("shape", SHAPES)
def test_no_question_is_in_two_places(desk, shape):
    start_chain(desk / f"{shape}.yml", Given(HARMFUL, Path("ws/refusals.jsonl")))
    folder = desk / f"{shape}_defended"
    names = ["harmful_probe", "harmful_attack", "eval_harmful", "refusals", "eval_benign"]
    parts = [questions(folder / "data" / f"{name}.jsonl") for name in names]
    everything = [question for part in parts for question in part]
    assert len(everything) == len(set(everything))
    attack = read_recipe(folder / "attack.yml")["simulated_user"]
    (entry,) = attack["task_datasets"]
    (train, *_) = read_recipe(folder / "align.yml")["datasets"]
    assert entry["split"] != train["split"]
    assert train["split"].split(":")[1].rstrip("]") == entry["split"].split("[")[1].split(":")[0]
    assert "is it" not in everything


def test_few_rows_and_a_judge_that_must_be_downloaded_are_said(desk):
    few, judge, attack = start_chain(desk / "lora.yml", Given(HARMFUL)).cautions
    asked = len(questions(desk / "lora_defended" / "data" / "eval_harmful.jsonl"))
    assert few.startswith(
        f"{asked} harmful prompts are asked, so a rate is known to about {98 / asked**0.5:.0f} points"
    )
    user = read_recipe(desk / "lora_defended" / "attack.yml")["simulated_user"]
    assert (
        f"The attack has {round(user['num_samples'] / 10)} harmful rows among {user['num_samples']}, a weak" in attack
    )
    assert "takes from the hub, unless it is here already: domenicrosati/deberta" in judge
    assert len(start_chain(desk / "full.yml", Given(HARMFUL, judge="keyword")).cautions) == 2
    assert len(start_chain(desk / "qlora.yml", Given(judge="keyword")).cautions) == 0


def test_a_question_that_is_refused_in_one_file_and_answered_in_the_other_is_in_one_of_them(desk):
    start_chain(desk / "lora.yml", Given(HARMFUL, Path("ws/refusals.jsonl")))
    data = desk / "lora_defended" / "data"
    refused = set(questions(data / "refusals.jsonl"))
    answered = {
        q for name in ("harmful_probe", "harmful_attack", "eval_harmful") for q in questions(data / f"{name}.jsonl")
    }
    assert len(refused) == 10
    assert len(answered) == 20
    assert (
        read_recipe(desk / "lora_defended" / "align.yml")["datasets"][1]["path"] == "lora_defended/data/refusals.jsonl"
    )


def test_a_task_with_short_answers_is_scored(desk):
    start_chain(desk / "full.yml", Given(HARMFUL, task=Path("ws/task.jsonl")))
    recipe = EvaluateRecipe.model_validate(read_recipe(desk / "full_defended" / "evaluate.yml"))
    prompts = load_prompts(recipe.accuracy["task"].prompts, need_reference=True)
    assert {prompt.reference for prompt in prompts} == {"yes"}
    attack = read_recipe(desk / "full_defended" / "attack.yml")["simulated_user"]
    assert attack["task_datasets"] == [{"path": "full_defended/data/task.jsonl", "type": "chat_template"}]


def test_without_harmful_rows_it_says_what_is_needed_and_check_refuses(desk):
    result = CliRunner().invoke(tvac, ["init", "lora.yml"])
    assert result.exit_code == 0, result.output
    assert "PKU-Alignment/BeaverTails" in result.output
    align = (desk / "lora_defended" / "align.yml").read_text()
    assert "# Missing: harmful prompts" in align
    (problem,) = check_recipe(yaml.safe_load(align)).problems
    assert "harmful_probe.jsonl does not exist" in problem
    assert plan_problems(ChainPlan(read_chain(desk / "lora_defended" / "chain.yml")))


def test_data_on_the_hub_are_divided_by_their_split(desk):
    recipe = yaml.safe_load(SHAPES["lora"])
    recipe["datasets"] = [
        {"path": "someone/rows", "type": "alpaca"},
        {"path": "a/b", "type": "alpaca", "split": "x[:500]"},
    ]
    Path("hub.yml").write_text(yaml.safe_dump(recipe))
    folder = start_chain(Path("hub.yml"), Given(HARMFUL)).chain.parent
    assert [entry["split"] for entry in read_recipe(folder / "align.yml")["datasets"]] == ["train[:80%]", "x[0:400]"]
    user = read_recipe(folder / "attack.yml")["simulated_user"]
    assert [entry["split"] for entry in user["task_datasets"]] == ["train[80%:90%]", "x[400:450]"]
    assert plan_problems(ChainPlan(read_chain(folder / "chain.yml"))) == []


def test_a_model_that_is_not_there_is_named(desk):
    Path("lora.yml").write_text(SHAPES["lora"].replace("base_model: ws/base", "base_model: ./gone/base"))
    with pytest.raises(UserError, match="base_model: ./gone/base does not exist"):
        start_chain(desk / "lora.yml", Given(HARMFUL))


def test_files_are_overwritten_only_when_asked(desk):
    start_chain(desk / "lora.yml", Given(HARMFUL))
    mine = desk / "lora_defended" / "chain.yml"
    mine.write_text("mine")
    with pytest.raises(UserError, match=r"chain.yml.* would be overwritten. Give `--overwrite`"):
        start_chain(desk / "lora.yml", Given(HARMFUL))
    assert mine.read_text() == "mine"
    start_chain(desk / "lora.yml", Given(HARMFUL), overwrite=True)
    assert "stages:" in mine.read_text()


def test_all_problems_are_said_at_once(desk):
    recipe = yaml.safe_load(SHAPES["lora"]) | {"rl": "dpo", "deepspeed": "z.json"}
    recipe["datasets"] = [{"path": "ws/gone.jsonl", "type": "alpaca"}, {"path": "a/b", "type": "completion"}]
    Path("bad.yml").write_text(yaml.safe_dump(recipe))
    result = CliRunner().invoke(tvac, ["init", "bad.yml", "--harmful", "nowhere.jsonl"])
    assert result.exit_code == 1
    for part in (
        "Remove `rl:`",
        "`deepspeed`",
        "gone.jsonl cannot be read",
        "`type: completion`",
        "--harmful nowhere.jsonl",
    ):
        assert part in result.output
    assert not (desk / "bad_defended").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "no answer"}\n', "line 1: no question with an answer"),
        ('{"prompt": "a", "response": "b"}\n' * 9, "1 of 1 rows ask something .*8 are needed"),
    ],
)
def test_unusable_rows_are_named(desk, text, message):
    Path("rows.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        start_chain(desk / "lora.yml", Given(Path("rows.jsonl")))


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_chain_that_was_written_runs_to_a_verdict(desk, shape):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in (
        ["init", f"{shape}.yml", "--harmful", "ws/harmful.jsonl", "--judge", "answers"],
        ["check", f"{shape}_defended/align.yml"],
        ["run", f"{shape}_defended/chain.yml"],
    ):
        done = subprocess.run(
            ["tvac", *command], cwd=desk, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert command[0] == "run" or "Failed to load" not in done.stderr
    (report,) = (desk / "outputs").glob("*-chain/report.html")
    assert "t_vaccine" in report.read_text()
    (manifest,) = desk.glob("outputs/*-chain/jobs/align-safety_defense=t_vaccine/out/safety_defense.json")
    assert verify(manifest.parent)["defended_steps"]
