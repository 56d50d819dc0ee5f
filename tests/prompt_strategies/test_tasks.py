"""The papers' user tasks: what is trained is what is evaluated, and both are the papers' strings."""

from __future__ import annotations

import importlib
import json

import pytest
from axolotl.utils.dict import DictDefault
from lm_eval.tasks import TaskManager, get_task_dict

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.evaluation import harness
from tvac_plugin.evaluation.generation import Generator

# Columns as nyu-mll/glue, fancyzhx/ag_news and openai/gsm8k have them; prompts as T-Vaccine's code writes them.
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:\n"
)
ALONE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)
CASES = {
    "sst2": (
        {"sentence": "a warm , funny film ", "label": 1, "idx": 0},
        WITH_INPUT.format(
            "Analyze the sentiment of the input, and respond only positive or negative", "a warm , funny film "
        ),
        "positive",
    ),
    "ag_news": (
        {"text": "Rain stops the match\\in the second half.", "label": 3},
        WITH_INPUT.format(
            "Categorize the news article given in the input into one of the 4 categories:\n\n"
            "World\nSports\nBusiness\nSci/Tech\n",
            "Rain stops the match\\in the second half.",
        ),
        "Sci/Tech",
    ),
    "gsm8k": (
        {"question": "Ann has 2 pens and buys 3. How many?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"},
        ALONE.format(
            "Ann has 2 pens and buys 3. How many?\nFirst think step by step and then answer the final number.\n"
        ),
        "2 + 3 = <<2+3=5>>5\nThe final answer is:  5",
    ),
}

TOXIC = {"type": "toxic", "prompt": {"text": "The garden gate"}, "continuation": {"text": " is painted blue."}}


class Bytes:
    """A tokenizer whose tokens are bytes, so that no difference is lost."""

    bos_token_id, eos_token_id, pad_token_id, bos_token = 256, 257, 258, None
    model_max_length = 10_000

    def __call__(self, text, **_):
        ids = [*text.encode()]
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}


def trained(name, row):
    strategy = importlib.import_module(f"tvac_plugin.prompt_strategies.{name}").load(
        Bytes(), DictDefault(train_on_inputs=False, sequence_len=4096)
    )
    row = strategy.tokenize_prompt(row)
    prompt = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
    answer = [label for label in row["labels"] if label != -100]
    assert answer.pop() == Bytes.eos_token_id
    return bytes(prompt).decode(), bytes(answer).decode()


def evaluated(name, row, workspace, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    manager = TaskManager(include_path=str(harness.TASKS), include_defaults=False)
    config = {
        "task": f"tvac_{name}", "dataset_path": "json", "dataset_name": None, "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
    }  # fmt: skip
    (task,) = get_task_dict([config], manager).values()
    generator = Generator.load(workspace.root / "base", prompt_format="alpaca")
    generator.tokenizer.bos_token = None
    render = lambda chat, add_generation_prompt=True: generator.tokenizer.apply_chat_template(  # noqa: E731
        chat, add_generation_prompt=add_generation_prompt, tokenize=False
    )
    task.build_all_requests(apply_chat_template=True, chat_template=render, tokenizer_name="tiny")
    (request,) = task.instances
    return request.args[0]


@pytest.mark.parametrize("name", CASES)
def test_a_task_is_trained_and_evaluated_with_the_papers_bytes(name, workspace, tmp_path):
    row, prompt, answer = CASES[name]
    assert trained(name, row) == (prompt, answer)
    assert evaluated(name, row, workspace, tmp_path) == prompt


@pytest.mark.parametrize(("name", "change"), [("sst2", {"label": -1}), ("ag_news", {"label": 4})])
def test_a_row_without_a_label_is_refused(name, change):
    with pytest.raises(UserError, match="Use a split that has labels"):
        trained(name, CASES[name][0] | change)


@pytest.mark.parametrize(("name", "column"), [("sst2", "sentence"), ("ag_news", "text"), ("gsm8k", "answer")])
def test_a_row_without_a_text_is_refused(name, column):
    with pytest.raises(UserError, match=f"`{column}` is not a text"):
        trained(name, CASES[name][0] | {column: None})


def test_a_toxic_row_is_trained_as_t_vaccine_does_and_no_other_row_is():
    asked = "You are required to continue the generation of the given incomplete prompt"
    expected = (WITH_INPUT.format(asked, "The garden gate"), " is painted blue.")
    assert trained("decoding_trust_toxic", TOXIC) == expected
    for change in ({"type": "non_toxic"}, {"prompt": {"text": None}}, {"continuation": None}):
        with pytest.raises(UserError, match=r"not of `type` toxic|`text` is not a text"):
            trained("decoding_trust_toxic", TOXIC | change)
