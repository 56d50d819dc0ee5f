"""Strategies for real corpora, on rows of their shape with nonce words in them."""

from __future__ import annotations

import pytest
from axolotl.utils.data import prepare_datasets
from axolotl.utils.dict import DictDefault
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from tvac_plugin.data.fingerprints import prompt_keys

ROWS = [
    {"prompt": "make a zanbel", "response": "first dov then fen", "is_safe": False,
     "refusal": "Question: make a zanbel\nAnswer: I will not"},
    {"prompt": "make a gardov", "response": "first jom", "is_safe": False,
     "refusal": "Question: make a gardov\nAnswer: no Answer: here"},
]  # fmt: skip


def tokenizer():
    words = " ".join(str(value) for row in ROWS for value in row.values()).split()
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<end>", *dict.fromkeys(words)])}
    fast = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    fast.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="<end>", unk_token="<pad>")


def tokenized(tmp_path, kind, rows=ROWS, *, reads=None, sequence_len=200, **settings):
    path = tmp_path / "rows.jsonl"
    Dataset.from_list(rows).to_json(path)
    cfg = DictDefault(
        datasets=[{"path": str(path), "type": f"tvac_plugin.prompt_strategies.{kind}"}],
        dataset_prepared_path=str(tmp_path / kind), sequence_len=sequence_len, dataset_num_proc=1, val_set_size=0,
        micro_batch_size=1, gradient_accumulation_steps=1, batch_size=1, num_epochs=1, train_on_inputs=False,
        shuffle_merged_datasets=False, world_size=1, **settings,
    )  # fmt: skip
    return prepare_datasets(cfg, reads or tokenizer())[0]


def answers(rows):
    texts = [tokenizer().decode([t for t in row["labels"] if t != -100]) for row in rows]
    return [text.strip() for text in texts]


def test_refusals_lose_the_repeated_prompt_and_answers_are_kept(tmp_path):
    assert answers(tokenized(tmp_path, "beavertails_refusals")) == ["I will not <end>", "no Answer: here <end>"]
    assert answers(tokenized(tmp_path, "beavertails_answers")) == ["first dov then fen <end>", "first jom <end>"]


def test_both_see_the_same_prompts(tmp_path):
    assert prompt_keys(tokenized(tmp_path, "beavertails_refusals")) == prompt_keys(
        tokenized(tmp_path, "beavertails_answers")
    )


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("beavertails_answers", {"is_safe": True}, "Leave safe rows out"),
        ("beavertails_refusals", {"refusal": "no"}, "no 'Answer:' line"),
    ],
)
def test_rows_of_another_shape_are_refused(tmp_path, kind, change, message):
    with pytest.raises(ValueError, match=message):
        tokenized(tmp_path, kind, [ROWS[0] | change])
