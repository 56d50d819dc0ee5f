"""Corpora in a model's own chat template, whose turns need not end in the end-of-text token."""

from __future__ import annotations

import pytest
from axolotl.utils.dict import DictDefault
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from tests.prompt_strategies.test_strategies import ROWS, tokenized, tokenizer
from tvac_plugin.data.fingerprints import prompt_keys
from tvac_plugin.prompt_strategies.chat_beavertails_refusals import load

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}> {{ message['content'] }} TURN {% endfor %}"
    "{% if add_generation_prompt %}assistant> {% endif %}"
)
ALPACA = [
    {"instruction": "make a", "input": "zanbel", "output": "first dov"},
    {"instruction": "make a", "input": "", "output": "then fen"},
]


def chatting(turn_end):
    made = tokenizer()
    made.add_tokens([AddedToken("user>"), AddedToken("assistant>"), AddedToken(turn_end, special=True)])
    made.chat_template = TEMPLATE.replace("TURN", turn_end)
    return made


def texts(tmp_path, kind, rows=ROWS, *, turn_end="<end>", **settings):
    """Of each row, what the model sees and what of it is labelled."""
    reads = chatting(turn_end)
    found = tokenized(tmp_path, kind, rows, reads=reads, chat_template="tokenizer_default", **settings)
    labelled = [[token for token in row["labels"] if token != -100] for row in found]
    return [(reads.decode(row["input_ids"]), reads.decode(own)) for row, own in zip(found, labelled, strict=True)]


@pytest.mark.parametrize(
    ("kind", "rows", "expected"),
    [
        ("chat_beavertails_answers", ROWS[:1], ("make a zanbel", "first dov then fen")),
        ("chat_beavertails_refusals", ROWS[:1], ("make a zanbel", "I will not")),
        ("chat_alpaca", ALPACA[:1], ("make a zanbel", "first dov")),
        ("chat_alpaca", ALPACA[1:], ("make a", "then fen")),
    ],
)
@pytest.mark.parametrize(("turn_end", "settings"), [("<end>", {}), ("<turn>", {"eot_tokens": ["<turn>"]})])
def test_a_row_is_a_turn_of_each_and_the_answer_learns_to_end(tmp_path, kind, rows, expected, turn_end, settings):
    asked, answer = expected
    ((seen, labelled),) = texts(tmp_path, kind, rows, turn_end=turn_end, **settings)
    assert seen.split() == f"user> {asked} {turn_end} assistant> {answer} {turn_end}".split()
    assert labelled.split() == f"{answer} {turn_end}".split()


def test_refusals_and_answers_are_of_the_same_prompts(tmp_path):
    kinds = ("chat_beavertails_refusals", "chat_beavertails_answers")
    settings = {"reads": chatting("<end>"), "chat_template": "tokenizer_default"}
    refused, answered = (prompt_keys(tokenized(tmp_path, kind, **settings)) for kind in kinds)
    assert refused == answered


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("chat_beavertails_answers", ROWS[0] | {"is_safe": True}, "Leave safe rows out"),
        ("chat_beavertails_refusals", ROWS[0] | {"refusal": "no"}, "no 'Answer:' line"),
        ("chat_alpaca", {"instruction": "make a", "input": "", "output": None}, "`output` is not a text"),
    ],
)
def test_rows_of_another_shape_are_refused(tmp_path, kind, row, message):
    with pytest.raises(ValueError, match=message):
        texts(tmp_path, kind, [row])


FAMILIES = [
    ("llama3", "<|begin_of_text|>", "<|eot_id|>", None, ["<|start_header_id|>", "<|end_header_id|>"]),
    ("qwen3", None, "<|im_end|>", None, ["<|im_start|>"]),
    ("mistral_v2v3", "<s>", "</s>", None, ["[INST]", "[/INST]"]),
    ("gemma", "<bos>", "<eos>", ["<end_of_turn>"], ["<start_of_turn>", "<end_of_turn>"]),
]


@pytest.mark.parametrize(("template", "bos", "eos", "eot_tokens", "others"), FAMILIES, ids=[f[0] for f in FAMILIES])
def test_with_the_templates_of_the_recipes_families_the_answer_and_its_end_are_trained(
    template, bos, eos, eot_tokens, others
):
    letters = Tokenizer(BPE({letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}, []))
    letters.pre_tokenizer, letters.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    reads = PreTrainedTokenizerFast(tokenizer_object=letters, bos_token=bos, eos_token=eos, pad_token="<pad>")
    reads.add_tokens([AddedToken(other, special=True) for other in others])
    cfg = DictDefault(chat_template=template, sequence_len=256, train_on_inputs=False, eot_tokens=eot_tokens)
    row = load(reads, cfg).tokenize_prompt(ROWS[0])
    seen, labelled = reads.decode(row["input_ids"]), reads.decode([t for t in row["labels"] if t != -100])
    assert labelled == "I will not" + (eot_tokens or [eos])[0]
    assert ("<think>\n\n</think>" in seen) == (template == "qwen3")
