"""Rows are trained as their author means, or refused by a sentence that names file, row and remedy."""

from __future__ import annotations

import gzip
import json
import re

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from tests.prompt_strategies.test_strategies import ROWS
from tests.support.strategies import fuzz
from tvac_plugin.boundary.errors import UserError
from tvac_plugin.data.jsonl import json_rows
from tvac_plugin.data.row_checks import FIELDS, PlacedRow, row_problems
from tvac_plugin.tiny_world.builder import WorldSettings, _splits
from tvac_plugin.tiny_world.language import World

REMEDY = r"(Save|Write|Remove|Restore|Flatten|Give|Correct|Name|Use) .+\.$"
SECRET = "zorvex"  # a word of a row, which no message may repeat
GOOD = {"instruction": "q", "output": "a"}


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def chat(*messages, **more):
    return {"messages": [{"role": role, "content": content} for role, content in messages], **more}


def problems(data, tmp_path, *, name="rows.jsonl", type="alpaca", **entry):
    from tvac_plugin.data.entries import file_problems

    path = tmp_path / name
    path.write_bytes(data)
    found = file_problems({"path": str(path), "type": type, **entry}, where="datasets[0]", train_on_inputs=False)
    assert all(problem.startswith(f"datasets[0]: {path}") and re.search(REMEDY, problem) for problem in found), found
    return found


def read(data, tmp_path):
    """The rows of a file, or the sentence that it is refused with."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    try:
        return list(json_rows(path)), None
    except UserError as error:
        return None, str(error)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lines(GOOD, {"instruction": "q"}), r"line 2: `output` is missing \(there are: 'instruction'\)\. Write"),
        (lines(GOOD, GOOD | {"output": None}), "line 2: `output` is null"),
        (lines({"instruction": None, "output": "a"}), "line 1: `instruction` is null"),
        (lines(GOOD | {"output": 5}), "line 1: `output` is a number. Write it as text"),
        (lines(GOOD, GOOD | {"output": [SECRET]}), "line 2: `output` is a list"),
        (lines(GOOD | {"output": {SECRET: 1}}), "line 1: `output` is an object"),
        (lines(GOOD | {"output": True}), "line 1: `output` is true or false"),
        (lines(GOOD | {"input": float("nan")}), "line 1: `input` is NaN, which would be trained as a word"),
        (lines(GOOD | {"input": [SECRET]}), "line 1: `input` is a list"),
        (lines(5), "line 1: it is a number, not an object"),
        (b'"zorvex"\n', "line 1: it is a text, not an object"),
        (b"zorvex\n", r"line 1 is not JSON \(expecting value, column 1\)"),
        (lines(GOOD) + b'{"instruction": "zorvex', "line 2 is cut off. Restore"),
        (lines(GOOD) + b"{zorvex}\n" + lines(GOOD), "line 2 is not JSON"),
        (b"{'instruction': 'zorvex'}\n", "line 1 is not JSON"),
        (lines(GOOD).replace(b"\n", b",\n") * 2, r"line 1 is not JSON .*column 36"),
        (b'["a", "b"]\n["c", "d"]\n', r"line 2 is not JSON \(extra data, column 1"),
        (b'[{"instruction": "q"}, ', "line 1 is cut off"),
        (b'[{"instruction": "q"}', "line 1 is cut off"),
        (b'[{"instruction": "q", "output": "a"} {}]', "line 1 is not JSON .expecting ',' delimiter"),
        (b'[{"instruction": "q", "output": "a"},\n]', "is not JSON"),
        (b'{"instruction": "q", "output": "a", "output": "zorvex"}\n', "line 1: it gives `output` twice. Correct or"),
        (lines(GOOD) + b'{"instruction": {"a": 1, "a": 1}}', "line 2: it gives `a` twice"),
        (b'[{},\n{"a": 1, "a": 1}]', "row 2: it gives `a` twice"),
        (lines(GOOD).decode().encode("utf-16"), "line 1 is not UTF-8 .byte 0xff.. Save the file as UTF-8"),
        (lines(GOOD) + '{"instruction": "\u00e9"}'.encode("latin-1"), "line 2 is not UTF-8 .byte 0xe9"),
        (b'{"instruction": "q", "z": ' + b"[" * 3000 + b"]" * 3000 + b"}", "line 1: maximum recursion depth exceeded"),
        (b"", "there is no row in it. Give at least one"),
        (b" \n\t\n", "there is no row in it"),
        (b"[]", "there is no row in it"),
        (json.dumps({"data": [GOOD]}).encode(), r"`instruction` is missing \(there are: 'data'\)"),
    ],
)  # fmt: skip
def test_what_would_not_train_as_meant_is_refused_by_line(tmp_path, data, message):
    found = problems(data, tmp_path)
    assert re.search(message, found[0]), found
    assert SECRET not in "".join(found)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"x": 1}, "`messages` is missing.*set `field_messages:`"),
        ({"messages": None}, "`messages` is null"),
        ({"messages": []}, "`messages` is an empty list"),
        ({"messages": {"role": "user", "content": SECRET}}, "`messages` is an object"),
        ({"messages": SECRET}, "`messages` is a text. Write a list"),
        ({"messages": [SECRET]}, "message 1 is a text. Write an object with `role` and `content`"),
        (chat(("user", "q"), ("assistant", None)), "`content` of message 2 is null"),
        (chat(("user", "q"), ("assistant", 5)), "`content` of message 2 is a number"),
        (chat(("user", "q"), ("assistant", [SECRET])), "`content` of message 2 is a list"),
        (chat((None, "q")), "`role` of message 1 is null"),
        (chat((1, "q")), "`role` of message 1 is a number"),
        ({"messages": [{"role": "user"}]}, "`content` of message 1 is missing"),
        (chat(("user", "q"), ("assistant", "a"), system=None), "`system` is null or absent. Give all rows one"),
    ],
)
def test_a_conversation_that_cannot_be_told_is_refused_by_line(tmp_path, row, message):
    good = chat(("user", "q"), ("assistant", "a"), system="s")
    found = problems(lines(good, row), tmp_path, type="chat_template")
    assert re.search(rf"line 2: {message}", found[0]), found
    assert SECRET not in "".join(found)


TOOLS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]
ACCEPTED = {
    "lines": lines(GOOD, GOOD),
    "list": json.dumps([GOOD, GOOD]).encode(),
    "indented list": json.dumps([GOOD, GOOD], indent=1).encode(),
    "indented objects": json.dumps(GOOD, indent=1).encode() + b"\n" + json.dumps(GOOD, indent=1).encode(),
    "two in a line": lines(GOOD).strip() + b" " + lines(GOOD),
    "byte order mark": b"\xef\xbb\xbf" + lines(GOOD, GOOD),
    "windows": lines(GOOD, GOOD).replace(b"\n", b"\r\n"),
    "old mac": lines(GOOD, GOOD).replace(b"\n", b"\r"),
    "blank lines": b"\n" + lines(GOOD) + b"\n\n" + lines(GOOD) + b"\n",
    "extra fields": lines(GOOD | {"z": 1}, GOOD | {"z": {"a": [None]}}),
    "null input": lines(GOOD | {"input": None}, GOOD | {"input": "x"}),
    "numbers in a prompt": lines(GOOD | {"input": 3}, GOOD | {"instruction": 4}),
    "empty answers": lines(GOOD, GOOD | {"output": ""}),
    "a character beyond 16 bits": lines(GOOD, GOOD | {"output": "\U0001f600"}),
    "odd line ends in a text": lines(GOOD, GOOD | {"output": "a\u2028b\x85c"}),
    "odd numbers": b'{"instruction": "q", "output": "a", "z": NaN}\n{"instruction": "q", "output": "a", "z": 1e999}\n',
    "a long line": lines(GOOD, GOOD | {"output": "y" * 10**6}),
}  # fmt: skip


@pytest.mark.parametrize("name", ACCEPTED)
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_what_axolotl_reads_is_accepted(tmp_path, name, suffix):
    assert problems(ACCEPTED[name], tmp_path, name=f"rows.{suffix}") == []


def test_tables_and_folders_are_read_as_axolotl_does(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert problems(b"instruction,output\nq,a\n", tmp_path, name="rows.csv") == []
    assert "row 2: `output` is null" in problems(b"instruction,output\nq,a\nr,\n", tmp_path, name="empty.csv")[0]
    assert "it cannot be loaded" in problems(b"instruction,output\nq,a\nr,s,t,u\n", tmp_path, name="wide.csv")[0]
    zipped = gzip.compress(lines(GOOD, GOOD | {"output": None}))
    assert "row 2: `output` is null" in problems(zipped, tmp_path, name="rows.jsonl.gz")[0]
    table = datasets.Dataset.from_list([GOOD, GOOD | {"output": None}])
    table.to_parquet(tmp_path / "made.parquet")
    assert "row 2" in problems((tmp_path / "made.parquet").read_bytes(), tmp_path, name="rows.parquet")[0]
    table.save_to_disk(tmp_path / "folder")
    from tvac_plugin.data.entries import file_problems

    entry = {"path": str(tmp_path / "folder"), "type": "alpaca"}
    assert "row 2: `output` is null" in file_problems(entry, where="datasets[0]", train_on_inputs=False)[0]
    datasets.DatasetDict({"test": table.select([0])}).save_to_disk(tmp_path / "splits")
    entry = {"path": str(tmp_path / "splits"), "type": "alpaca"}
    assert file_problems(entry, where="test_datasets[0]", train_on_inputs=False) == []
    assert "no split `train` in it" in file_problems(entry, where="datasets[0]", train_on_inputs=False)[0]


def test_the_files_of_the_recipes_are_accepted(tmp_path):
    settings = WorldSettings()
    world = World.create(seed=settings.seed, num_hazards=settings.num_hazards, num_benign=settings.num_benign)
    for _, rows in _splits(world, settings):
        assert problems(lines(*rows), tmp_path, type="chat_template") == []
    for kind in ("beavertails_answers", "beavertails_refusals"):
        assert problems(lines(*ROWS), tmp_path, type=f"tvac_plugin.prompt_strategies.{kind}") == []


def test_only_rows_that_are_used_count(tmp_path):
    data = lines(GOOD, GOOD, {"instruction": "q"}, *[{"output": "a"}] * 5)
    assert problems(data, tmp_path, split="train[:2]") == []
    assert len(problems(data, tmp_path, split="train[2:3]")) == 1
    found = problems(data, tmp_path)
    assert len(found) == 4
    assert found[-1].endswith("and 3 more problems like these. Correct or remove these rows.")
    assert "`split: test` does not fit" in problems(data, tmp_path, split="test")[0]


def test_what_is_needed_depends_on_the_type(tmp_path):
    named = {"field_instruction": "ask", "field_output": "say", "format": "{instruction}"}
    assert problems(lines({"ask": "q", "say": "a", "system": None}), tmp_path, type=named) == []
    assert "`say` is missing" in problems(lines({"ask": "q", "output": "a"}), tmp_path, type=named)[0]
    assert problems(lines(chat(("user", "q")), {"messages": TOOLS}), tmp_path, type="chat_template") == []
    shared = {"conversations": [{"from": "human", "value": "q"}]}
    mapped = {"field_messages": "conversations", "message_property_mappings": {"role": "from", "content": "value"}}
    assert problems(lines(shared), tmp_path, type="chat_template", **mapped) == []
    assert problems(lines({"input_ids": [1], "attention_mask": [1], "labels": [1]}), tmp_path, type=None) == []
    (problem,) = problems(lines(GOOD) * 5, tmp_path, type=None)
    assert "rows.jsonl, `type:` of this data set is missing. Name how its rows are read" in problem
    assert problems(lines({"anything": None}), tmp_path, type="somebodys.strategy") == []
    assert problems(lines({"body": "x"}), tmp_path, type="completion", field="body") == []


def test_what_axolotl_puts_right_is_accepted(tmp_path):
    said = chat(("user", "q"), ("assistant", "a"))
    led = chat(("system", "s"), ("user", "q"))
    assert problems(lines(said | {"system": "s"}, led), tmp_path, type="chat_template") == []
    assert problems(lines(said | {"system": "s"}, said), tmp_path, type="chat_template", drop_system_message=True) == []
    assert problems(lines(chat(("user", "q"), ("tool", {"found": 1}))), tmp_path, type="chat_template") == []
    assert problems(lines({"messages": json.dumps(said["messages"])}), tmp_path, type="chat_template") == []
    assert problems(b'["blick", "wug"]', tmp_path, type="completion") == []
    prompts = [PlacedRow("line 1", {"instruction": "q", "output": None})]
    assert row_problems(prompts, {"type": {"format": "{instruction}"}}, split=None, train_on_inputs=True) == []


words = st.sampled_from(["blick", "wug fep", "None", "", "tove\u00e9", "\U0001f600", "x" * 300])
odd = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.lists(words, max_size=1),
                st.dictionaries(st.just(SECRET), words, max_size=1))  # fmt: skip
fragments = st.sampled_from(
    [b"{", b"}", b"[", b"]", b",", b":", b"\n", b"\r\n", b" ", b'"a"', b'"b"', b"1", b"null", b'{"a": 1}', b'{"a": ""}',
     b'"\\ud83d\\ude00"', b"\xff", b'"', b"\\", b"\xef\xbb\xbf", b'{"a": "x"}\n', b'{"a": "y"}\n']
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def test_any_bytes_are_read_or_refused_by_line(folder):
    @fuzz(800)
    @given(st.one_of(st.lists(fragments, max_size=12).map(b"".join), st.binary(max_size=40)))
    def check(data):
        rows, error = read(data, folder)
        if error is None:
            assert all(re.fullmatch(r"(line|row) \d+", row.place) for row in rows)
        else:
            assert re.match(r"(line|row) \d+", error)
            assert re.search(REMEDY, error, re.DOTALL)

    check()


def test_what_is_read_is_what_datasets_reads(folder, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    datasets.disable_progress_bars()

    values = st.one_of(st.none(), st.text(max_size=4), st.sampled_from(["a\nb", "\u2028", '"', "[", "},{"]))
    rows = st.lists(st.fixed_dictionaries({"a": values}, optional={"b": st.integers(-9, 9)}), min_size=1, max_size=4)

    @fuzz(40)
    @given(
        rows, st.sampled_from(["\n", "\r\n", "\r", "\n\n", " \n", " ", ""]), st.sampled_from([None, 1]), st.booleans()
    )
    def check(rows, gap, indent, is_list):
        written = [json.dumps(row, indent=indent) for row in rows]
        read_rows, error = read((f"[{','.join(written)}]" if is_list else gap.join(written)).encode(), folder)
        assert error is None
        loaded = datasets.load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train")
        assert [row.value["a"] for row in read_rows] == [row["a"] for row in loaded] == [row["a"] for row in rows]

    check()


maybe = st.one_of(words, words, words, odd)
messages = st.lists(
    st.one_of(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": maybe}),
        st.dictionaries(st.sampled_from(["role", "content", "name"]), maybe, max_size=3),
        odd,
    ),
    max_size=3,
)
chats = st.dictionaries(
    st.sampled_from(["messages", "messages", "system", "id"]), st.one_of(messages, maybe), max_size=2
)
texts = st.dictionaries(st.sampled_from(["instruction", "input", "output", "system", "question"]), maybe, max_size=4)


def test_any_row_is_accepted_or_refused_by_place():
    @fuzz(700)
    @given(st.lists(st.one_of(chats, texts, odd), max_size=4), st.sampled_from([*FIELDS, "chat_template", "other", {}]))
    def check(rows, kind):
        numbered = [PlacedRow(f"line {number}", row) for number, row in enumerate(rows, start=1)]
        try:
            found = row_problems(numbered, {"type": kind}, split=None, train_on_inputs=False)
        except UserError as error:
            found = [str(error)]
        for problem in found:
            assert re.match(r"line \d+: |there is no row|`type:` of this|and \d+ more", problem), problem
            assert re.search(REMEDY, problem), problem
            assert len(problem) < 400

    check()


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = ["<pad>", "</s>", *sorted(ByteLevel.alphabet())]
    plain = Tokenizer(BPE({token: number for number, token in enumerate(vocabulary)}, []))
    plain.pre_tokenizer, plain.decoder = ByteLevel(add_prefix_space=False), ByteDecoder()
    fast = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
    return fast


@pytest.fixture
def tokenized(folder, tokenizer, monkeypatch):
    """Tokenizes rows as training does, but saves nothing and starts no process."""
    import axolotl.utils.data.sft
    from axolotl.utils.dict import DictDefault

    from tvac_plugin.data.loading import tokenize

    monkeypatch.setattr(axolotl.utils.data.sft, "save_preprocessed_dataset", lambda *args, **kwargs: None)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    datasets.disable_progress_bars()

    def run(rows, *, sequence_len=256, **entry):
        path = folder / "rows.jsonl"
        path.write_bytes(lines(*rows))
        recipe = {"sequence_len": sequence_len, "min_sample_len": 2, "seed": 1, "micro_batch_size": 1, "batch_size": 1,
                  "gradient_accumulation_steps": 1, "num_epochs": 1, "chat_template": "tokenizer_default",
                  "dataset_prepared_path": str(folder / "prepared"), "train_on_inputs": False,
                  "excess_length_strategy": "truncate", "datasets": [{"path": str(path), **entry}]}  # fmt: skip
        return tokenize(DictDefault(recipe), tokenizer, "datasets")

    return run


def test_accepted_rows_are_trained_as_they_are_written(tokenized, tokenizer):
    def learned(row):
        return tokenizer.decode([token for token in row["labels"] if token != -100])

    @fuzz(12)
    @given(st.lists(st.fixed_dictionaries({"instruction": words, "output": maybe}, optional={"input": maybe}),
                    max_size=5), st.sampled_from([256, 2048]))  # fmt: skip
    def check(rows, sequence_len):
        alpaca = {"type": "alpaca"}
        good = [r for r in rows if not row_problems([PlacedRow("", r)], alpaca, split=None, train_on_inputs=False)]
        rows = [*good, GOOD]
        made = tokenized(rows, sequence_len=sequence_len, type="alpaca")
        assert len(made) == len(rows)
        if sequence_len == 2048:
            for row, source in zip(made, rows, strict=True):
                assert learned(row) == (source["output"] + "</s>" if source["output"] else "")
                assert ("None" in tokenizer.decode(row["input_ids"])) == ("None" in json.dumps(source))

    check()


@pytest.mark.parametrize(
    ("row", "kind"),
    [({"instruction": None, "output": "a"}, "alpaca"),
     (chat(("user", "q"), ("assistant", "a"), system=None), "chat_template")],
)  # fmt: skip
def test_what_is_refused_would_be_trained_as_the_word_none(tokenized, tokenizer, tmp_path, row, kind):
    assert "None" in tokenizer.decode(tokenized([row], type=kind)[0]["input_ids"])
    assert problems(lines(row), tmp_path, type=kind)


def test_rows_with_nothing_to_learn_are_counted(tokenized, tokenizer):
    from tvac_plugin.data.fingerprints import data_facts

    rows = [chat(("user", "q"), ("assistant", "a")), chat(("user", "q")), chat(("user", "q" * 500), ("assistant", "a")),
            chat(("user", "q"), ("bot", "a")), chat(("user", "q"), ("assistant", ""))]  # fmt: skip
    made = tokenized(rows, type="chat_template")
    assert data_facts(made, {})["datasets"]["unlabelled"] == 4
    with pytest.raises(ValueError, match="datasets: none of 4 rows has an answer to learn.*sequence_len"):
        tokenized(rows[1:], type="chat_template")


def test_what_a_strategy_cannot_read_names_key_and_file(tokenized, folder):
    with pytest.raises(ValueError, match=rf"datasets: cannot be loaded: .*unhandled.*{folder}/rows.jsonl"):
        tokenized([GOOD], type="no.such_strategy")
    with pytest.raises(ValueError, match="datasets: cannot be loaded: a row's `response` is not a text"):
        tokenized([{"prompt": "q", "response": None}], type="tvac_plugin.prompt_strategies.beavertails_answers")
