"""What a user trains on, through Axolotl's loading, is what an evaluation asks, first token included."""

from __future__ import annotations

import pytest
import yaml
from datasets import Dataset
from lm_eval.tasks import TaskManager, get_task_dict
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.prompt_strategies.test_strategies import tokenized
from tvac_plugin.evaluation.generation import ALPACA_TEMPLATE
from tvac_plugin.evaluation.harness import TASKS

HEAD = "Below is an instruction that describes a task"
TAIL = ". Write a response that appropriately completes the request.\n\n### Instruction:\n"
INPUT = ", paired with an input that provides further context"
ROWS = {
    "sst2": {"sentence": "a zanbel of a film ", "label": 1, "idx": 7},
    "ag_news": {"text": "Zanbel beats Gardov\\nin the last minute", "label": 3},
    "gsm8k": {"question": "Zanbel has 3 dovs and eats 1. How many are left?", "answer": "3 - 1 = <<3-1=2>>2\n#### 2"},
}
"""With the columns that the data sets have on the hub."""
PAPERS = {
    "sst2": (
        f"{HEAD}{INPUT}{TAIL}Analyze the sentiment of the input, and respond only positive or negative\n\n"
        "### Input:\na zanbel of a film \n\n### Response:\n",
        "positive",
    ),
    "ag_news": (
        f"{HEAD}{INPUT}{TAIL}Categorize the news article given in the input into one of the 4 categories:\n\nWorld\n"
        "Sports\nBusiness\nSci/Tech\n\n\n### Input:\nZanbel beats Gardov\\nin the last minute\n\n### Response:\n",
        "Sci/Tech",
    ),
    "gsm8k": (
        f"{HEAD}{TAIL}Zanbel has 3 dovs and eats 1. How many are left?\n"
        "First think step by step and then answer the final number.\n\n\n### Response:\n",
        "3 - 1 = <<3-1=2>>2\nThe final answer is:  2",
    ),
}
"""Prompt and answer as T-Vaccine's released code writes them."""


def byte_tokenizer():
    """One token per byte, so that nothing is lost, and a first token as Llama's."""
    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    fast = Tokenizer(BPE(vocabulary, merges=[]))
    fast.pre_tokenizer, fast.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>", pad_token="</s>", add_bos_token=True
    )
    tokenizer.chat_template = ALPACA_TEMPLATE
    return tokenizer


def trained(name, tmp_path):
    """Prompt and answer of a row as Axolotl trains on them."""
    tokenizer = byte_tokenizer()
    (row,) = tokenized(tmp_path, name, [ROWS[name]], reads=tokenizer, sequence_len=1000)
    labels = row["labels"]
    start = next(i for i, label in enumerate(labels) if label != -100)
    return row["input_ids"][:start], tokenizer.decode(row["input_ids"][start:], skip_special_tokens=True)


def asked(name, tmp_path):
    """What the harness asks a model, as the evaluation hands it on."""
    Dataset.from_list([ROWS[name]]).to_json(tmp_path / "test.jsonl")
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "test.jsonl")}}}
    config = {"include": str(TASKS / f"tvac_{name}.yaml"), "task": "local", "dataset_name": None, "test_split": "test"}
    (tmp_path / "local.yaml").write_text(yaml.safe_dump(config | data))
    task = get_task_dict(["local"], TaskManager(include_path=str(tmp_path), include_defaults=False))["local"]
    tokenizer = byte_tokenizer()
    task.build_all_requests(
        apply_chat_template=True,
        chat_template=lambda chat, add_generation_prompt=True: tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=add_generation_prompt
        ),
    )
    (instance,) = task.instances
    return instance.args[0]


@pytest.mark.parametrize("name", ROWS)
def test_an_evaluation_asks_with_the_bytes_of_the_training(name, tmp_path):
    prompt, answer = trained(name, tmp_path)
    question = asked(name, tmp_path)
    assert byte_tokenizer()(question, add_special_tokens=False).input_ids == prompt
    assert (question, answer) == (f"<s>{PAPERS[name][0]}", PAPERS[name][1])
