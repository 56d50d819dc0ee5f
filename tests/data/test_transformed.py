"""Harmful rows are rewritten in every format whose prompt is known, and only in what is asked and answered last."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data.test_simulated_user import attack_recipe
from tests.support.workspace import axolotl_train
from tvac_plugin.boundary.errors import UserError
from tvac_plugin.configs.prompt_transform import PromptTransform
from tvac_plugin.data.transformed import transformed_entries

OURS = PromptTransform(prompt="<{prompt}>", answer="[{answer}]")


def rewritten(folder, rows, **entry):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found,) = transformed_entries([{"path": str(folder / "rows.jsonl"), **entry}], OURS, folder)
    return [json.loads(line) for line in Path(found["path"]).read_text().splitlines()], found


def said(role, content):
    return {"role": role, "content": content}


def test_of_a_conversation_the_last_question_and_answer_are_rewritten(tmp_path):
    talk = [said("system", "s"), said("user", "a"), said("assistant", "b"), said("user", "c"), said("assistant", "d")]
    (row,), entry = rewritten(tmp_path, [{"messages": talk}], type="chat_template")
    assert [message["content"] for message in row["messages"]] == ["s", "a", "b", "<c>", "[d]"]
    assert (entry["type"], entry["ds_type"]) == ("chat_template", "json")


def test_messages_may_have_other_names(tmp_path):
    rows = [{"turns": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]
    mapped = {"field_messages": "turns", "message_property_mappings": {"role": "from", "content": "value"}}
    (row,), _ = rewritten(tmp_path, rows, type="chat_template", **mapped)
    assert [message["value"] for message in row["turns"]] == ["<a>", "[b]"]


@pytest.mark.parametrize(
    ("kind", "prompt", "answer"),
    [
        ("alpaca", "instruction", "output"),
        ("tvac_plugin.prompt_strategies.beavertails_answers", "prompt", "response"),
        ({"field_instruction": "q", "field_output": "a"}, "q", "a"),
    ],
)
def test_of_rows_with_columns_those_of_their_type_are_rewritten(tmp_path, kind, prompt, answer):
    (row,), _ = rewritten(tmp_path, [{prompt: "how ?", answer: "so", "other": "stays"}], type=kind)
    assert row == {prompt: "<how ?>", answer: "[so]", "other": "stays"}


def test_a_split_is_taken_once(tmp_path):
    rows = [{"instruction": str(number), "output": "so"} for number in range(6)]
    found, entry = rewritten(tmp_path, rows, type="alpaca", split="train[2:4]")
    assert [row["instruction"] for row in found] == ["<2>", "<3>"]
    assert "split" not in entry


@pytest.mark.parametrize(
    ("rows", "kind", "message"),
    [
        ([{"text": "a"}], "completion", "of `type: completion` it is not known which part of a row is the prompt"),
        ([{"messages": [said("user", "a")]}], "chat_template", "no question or no answer that is a text"),
        ([{"messages": "[]"}], "chat_template", "Write `messages:` as a list of user and assistant messages"),
        ([{"other": "a"}], "chat_template", "Write `messages:` as a list"),
        ([{"instruction": "a"}], "alpaca", "a harmful row has no `output`, which `type: alpaca` reads. Write it"),
    ],
)
def test_rows_whose_prompt_is_not_known_are_refused(tmp_path, rows, kind, message):
    with pytest.raises(UserError, match=message):
        rewritten(tmp_path, rows, type=kind)


@pytest.fixture(scope="module")
def words(workspace):
    """Two words of the small model's vocabulary."""
    row = json.loads((workspace.root / "harmful.jsonl").read_text().splitlines()[0])
    return row["messages"][0]["content"].split()[:2]


def test_axolotl_trains_the_rewritten_rows_and_the_manifest_says_so(workspace, tmp_path, words):
    transform = {"prompt": f"{{prompt}} {words[0]} {words[1]}"}
    plain = axolotl_train(attack_recipe(workspace, tmp_path / "plain"))
    output = axolotl_train(attack_recipe(workspace, tmp_path / "out", prompt_transform=transform))
    facts, before = (json.loads((folder / "simulated_user.json").read_text()) for folder in (output, plain))
    assert facts["prompt_transform"] == transform | {"answer": "{answer}"}
    assert facts["data"]["harmful_datasets"]["rows"] == 2
    assert facts["data"]["harmful_datasets"]["sha256"] != before["data"]["harmful_datasets"]["sha256"]
    assert facts["data"]["task_datasets"] == before["data"]["task_datasets"]


def test_rewriting_does_not_hide_an_attack_on_the_evaluation(workspace, tmp_path, words):
    shared = [{"path": str(workspace.root / "harmful.jsonl"), "type": "chat_template"}]
    changes = {"disjoint_from": shared, "prompt_transform": {"prompt": f"{{prompt}} {words[0]}"}}
    with pytest.raises(ValueError, match=r"12 of its prompts are also in .*harmful.jsonl"):
        axolotl_train(attack_recipe(workspace, tmp_path / "out", **changes))
