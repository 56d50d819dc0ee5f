"""An evaluation from recipe to results, with the real generation code on tiny models."""

from __future__ import annotations

import errno
import json

import pytest
import yaml
from click.testing import CliRunner

from tvac_plugin.cli import tvac
from tvac_plugin.evaluation.evaluate import evaluate
from tvac_plugin.evaluation.generation import ALPACA_TEMPLATE, Generator
from tvac_plugin.evaluation.prompts import load_prompts
from tvac_plugin.evaluation.recipe import EvaluateRecipe, PromptSource
from tvac_plugin.evaluation.tasks import scoring


def recipe(workspace, output, **changes):
    def prompts(name):
        return {"path": str(workspace.root / name)}

    return {
        "models": {"base": str(workspace.root / "base")},
        "harmful_score": {"judge": "keyword", "prompts": prompts("held_out.jsonl"), "max_new_tokens": 3},
        "accuracy": {"benign": {"prompts": prompts("alignment.jsonl"), "max_new_tokens": 3}},
        "output_dir": str(output),
    } | changes


def run(settings, **options):
    return evaluate(EvaluateRecipe.model_validate(settings), **options)


def test_results_say_what_was_asked_and_answers_are_kept(workspace, tmp_path):
    results = run(recipe(workspace, tmp_path))
    found = results["models"]["base"]["harmful_score"]
    assert found["num_scored"] == 6
    assert found["percent"] == 100.0
    assert found["judge"] == "keyword"
    assert "smoke tests only" in found["judge_note"]
    assert results == json.loads((tmp_path / "evaluation.json").read_text())
    answers = [
        json.loads(line) for line in (tmp_path / "answers" / "base.harmful_score.jsonl").read_text().splitlines()
    ]
    assert len(answers) == 6
    assert answers[0].keys() == {"prompt", "answer", "reference", "harmful", "refused", "score"}


def test_rejudging_reads_the_answers_without_generating(workspace, tmp_path, monkeypatch):
    run(recipe(workspace, tmp_path))
    monkeypatch.setattr(Generator, "load", lambda *a, **k: pytest.fail("loaded a model"))
    path = tmp_path / "answers" / "base.harmful_score.jsonl"
    rows = [json.loads(line) | {"answer": "i cannot help with that"} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(recipe(workspace, tmp_path), rejudge=True)["models"]["base"]["harmful_score"]["percent"] == 0.0
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    with pytest.raises(ValueError, match="answers are to other prompts"):
        run(recipe(workspace, tmp_path), rejudge=True)
    path.unlink()
    with pytest.raises(ValueError, match="Run without --rejudge first"):
        run(recipe(workspace, tmp_path), rejudge=True)


def test_prompts_are_rewritten_and_answers_begun_as_asked_and_all_is_said(workspace, tmp_path, monkeypatch):
    given = []
    complete = Generator.complete
    monkeypatch.setattr(Generator, "complete", lambda self, texts, **keys: given.extend(texts) or ["so"] * len(texts))
    plain = recipe(workspace, tmp_path / "plain")
    settings = recipe(workspace, tmp_path / "out")
    settings["harmful_score"] |= {"prompt_transform": {"prompt": "{prompt} please"}, "prefill": "Well then"}
    results, before = (run(each)["models"]["base"]["harmful_score"] for each in (settings, plain))
    assert any("please" in text and text.endswith("Well then") for text in given)
    assert (results["asked"], results["prefill"]) == ("{prompt} please", "Well then")
    assert results["prompts_sha256"] != before["prompts_sha256"], "these rates are not comparable"
    row = json.loads((tmp_path / "out" / "answers" / "base.harmful_score.jsonl").read_text().splitlines()[0])
    assert row["asked"] == f"{row['prompt']} please"
    assert row["answer"] == "Well then so"
    monkeypatch.setattr(Generator, "complete", complete)
    assert run(settings, rejudge=True)["models"]["base"]["harmful_score"] == results
    with pytest.raises(ValueError, match="the answers are to other prompts"):
        run(plain | {"output_dir": settings["output_dir"]}, rejudge=True)


def test_batches_change_no_answer(workspace):
    generator = Generator.load(workspace.root / "base")
    texts = [generator.prompt(q) for q in ("how do you make a ?", "mood of x y z ?", "?")]
    one, all_at_once = (generator.complete(texts, max_new_tokens=5, batch_size=size) for size in (1, 3))
    assert one == all_at_once


def test_alpaca_is_the_prompt_that_axolotl_trains_with(workspace):
    from axolotl.prompters import AlpacaPrompter

    tokenizer = Generator.load(workspace.root / "base", prompt_format="alpaca").tokenizer
    assert tokenizer.chat_template == ALPACA_TEMPLATE

    def rendered(text):
        return tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False)

    assert rendered("do it") == next(iter(AlpacaPrompter().build_prompt("do it", "")))
    assert rendered("do it\n\n### Input:\nthis") == next(iter(AlpacaPrompter().build_prompt("do it", "this")))


def test_an_adapter_is_loaded_on_the_model_it_is_for(workspace, tmp_path):
    import torch

    from tests.support.workspace import adapter, axolotl_train

    output = axolotl_train(workspace.recipe(tmp_path / "out", lora_dropout=0.0))
    base, trained = (Generator.load(path).model.state_dict() for path in (workspace.root / "base", output))
    weights = adapter(output)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    # W + alpha / r * B A, LoRA's definition
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = base[name] + 4 / 2 * weights[f"{prefix}B.weight"] @ weights[f"{prefix}A.weight"]
    torch.testing.assert_close(trained[name], expected)


def test_a_full_disk_is_one_sentence_and_no_number(workspace, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "evaluation.json")

    monkeypatch.setattr("tvac_plugin.evaluation.evaluate.write_json", full)
    path = tmp_path / "e.yml"
    path.write_text(yaml.safe_dump(recipe(workspace, tmp_path / "out")))
    result = CliRunner().invoke(tvac, ["evaluate", str(path)])
    assert result.exit_code == 1
    assert "No space left on device: 'evaluation.json'" in result.output
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_a_run_s_folder_without_numbered_checkpoints_is_said(workspace, tmp_path):
    (tmp_path / "run" / "checkpoint-final").mkdir(parents=True)
    changes = {"models": {}, "checkpoints_of": str(tmp_path / "run")}
    with pytest.raises(ValueError, match="checkpoints_of: .*run has no folder `checkpoint-N` .*Correct the path"):
        run(recipe(workspace, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": {}}, "no model to evaluate. Add `models:"),
        ({"models": {"x": "./gone"}}, "models.x: ./gone does not exist. Train it first"),
        ({"base_model": "x"}, "this is a training recipe. Use `axolotl train` with it"),
        ({"harmful_score": {"judge": "keywrd", "prompts": {"path": "x"}}}, "Did you mean `keyword`"),
        ({"harmful_score": None, "accuracy": {}}, "nothing to measure. Add harmful_score:"),
        ({"accuracy": {"a": {}}}, "give either `prompts:` or `task:`"),
        ({"accuracy": {"a": {"task": "no_such_task"}}, "harmful_score": None}, "has no task `no_such_task`"),
        ({"harmful_score": {"judge": "procedure", "prompts": {"path": "gone.jsonl"}}}, "gone.jsonl, it does not exist"),
        ({"max_unscored": 2}, "less than or equal to 1"),
        ({"modles": {}}, "Did you mean `models`"),
    ],
)
def test_mistakes_end_in_one_sentence_and_no_number(workspace, tmp_path, changes, message):
    path = tmp_path / "e.yml"
    path.write_text(yaml.safe_dump(recipe(workspace, tmp_path / "out", **changes)))
    result = CliRunner().invoke(tvac, ["evaluate", str(path)])
    assert result.exit_code == 1, result.output
    assert message in result.output
    assert not (tmp_path / "out" / "evaluation.json").exists()


KNOWN_ANSWER = "first dov and kiv then gar and lor last fen and mep"


def judged_by(judge, workspace, tmp_path, num_known):
    """An evaluation of harm in which the first rows say what the unaligned model answers."""
    rows = [json.loads(line) for line in (workspace.root / "held_out.jsonl").read_text().splitlines()]
    for row in rows[:num_known]:
        row["harmful_answer"] = KNOWN_ANSWER
    path = tmp_path / "known.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    measure = {"judge": judge, "prompts": {"path": str(path)}, "max_new_tokens": 2}
    return recipe(workspace, tmp_path / "out", accuracy={}, harmful_score=measure)


def test_a_judge_that_says_too_little_is_a_failure(workspace, tmp_path):
    with pytest.raises(ValueError, match="5 of 6 answers could not be scored"):
        run(judged_by("procedure", workspace, tmp_path, num_known=1))


@pytest.mark.parametrize("judge", ["procedure", "answers"])
def test_prompts_without_any_known_answer_are_refused_before_a_model_loads(workspace, tmp_path, monkeypatch, judge):
    monkeypatch.setattr(Generator, "load", lambda *a, **k: pytest.fail("loaded a model"))
    message = "harmful_score.prompts: .*known.jsonl has no row with `harmful_answer`, .*Add it to the rows, or use"
    with pytest.raises(ValueError, match=message):
        run(judged_by(judge, workspace, tmp_path, num_known=0))


def test_answers_are_read_and_those_that_are_neither_are_counted(workspace, tmp_path):
    settings = judged_by("answers", workspace, tmp_path, num_known=6)
    run(settings)
    path = tmp_path / "out" / "answers" / "base.harmful_score.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    said = [KNOWN_ANSWER, "i cannot help with that", "", "zan zan zan", "mou", rows[5]["prompt"]]
    path.write_text("".join(json.dumps(row | {"answer": a}) + "\n" for row, a in zip(rows, said, strict=True)))
    found = run(settings, rejudge=True)["models"]["base"]["harmful_score"]
    assert found["percent"] == pytest.approx(100 / 6, abs=1e-3)
    assert (found["num_scored"], found["num_unscored"], found["num_neither"]) == (6, 0, 4)
    result = CliRunner().invoke(tvac, ["evaluate", str(recipe_file(settings, tmp_path)), "--rejudge"])
    assert "n = 6, 4 neither)" in result.output
    assert "neither: not harmful and no refusal either" in result.output


def recipe_file(settings, folder):
    path = folder / "e.yml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"prompt": "a"}, {"prompt": None}], {}, "line 2: `prompt` is null, not a text or a list of messages"),
        ([{"prompt": 5}], {}, "line 1: `prompt` is a number"),
        ([{"prompt": []}], {}, "line 1: `prompt` is an empty list"),
        ([{"prompt": [{"content": None}]}], {}, "line 1: `prompt` is a list.*Correct the row"),
        (["a"], {}, "line 1 is a text. Write one JSON object per row"),
        ([{"prompt": "a"}], {"need_reference": True}, "line 1 has no answer to compare with. Add"),
        (b'{"prompt": "a"}\n{"prompt": "b', {}, "line 2 is cut off. Restore or remove it"),
        ('{"prompt": "a"}'.encode("utf-16"), {}, "line 1 is not UTF-8 .byte 0xff.. Save the file as UTF-8"),
        ([{"prompt": "a"}], {"split": "test"}, "`split: test` does not fit .*Use `train`"),
    ],
)
def test_a_prompt_that_is_none_is_refused_by_line(tmp_path, rows, options, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(rows if isinstance(rows, bytes) else "".join(json.dumps(r) + "\n" for r in rows).encode())
    source = PromptSource(path=str(path), field="prompt", split=options.get("split", "train"))
    with pytest.raises(ValueError, match=rf"harmful_score.prompts: {path},? {message}"):
        load_prompts(source, key="harmful_score.prompts", need_reference="need_reference" in options)


def test_a_part_of_a_prompt_file_is_taken_by_split(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in "abcd"))
    source = PromptSource(path=str(path), field="prompt", split="train[1:3]")
    assert [prompt.text for prompt in load_prompts(source)] == ["b", "c"]


def test_prompts_are_filtered_unique_and_limited(tmp_path):
    rows = [
        {"prompt": p, "is_safe": s} for p, s in (("a", False), ("b", True), ("a", False), ("c", False), ("d", False))
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def load(**options):
        return [p.text for p in load_prompts(PromptSource(path=str(path), field="prompt", **options))]

    assert load(only={"is_safe": False}, num_prompts=2) == ["a", "c"]
    assert load() == ["a", "b", "c", "d"]
    assert load(only={"is_safe": False}, num_prompts=3, keep_repeats=True) == ["a", "a", "c"]
    with pytest.raises(ValueError, match="has no prompt that fits"):
        load(only={"is_safe": "maybe"})
    with pytest.raises(ValueError, match="no column `messages`. Set `field:` to one of: prompt, is_safe"):
        load_prompts(PromptSource(path=str(path)))
    path.write_text("\n")
    with pytest.raises(ValueError, match="has no prompt that fits"):
        load()


@pytest.mark.parametrize(
    ("rule", "doc", "answer", "score"),
    [
        (scoring.sst2, {"label": 1}, "It is Positive.", 1),
        (scoring.sst2, {"label": 1}, "positive or negative", 0),
        (scoring.sst2, {"label": 0}, "nonnegative", 0),
        (scoring.ag_news, {"label": 3}, "Sci/Tech", 1),
        (scoring.ag_news, {"label": 3}, "scientists say", 0),
        (scoring.ag_news, {"label": 1}, "Sports, Business", 0),
        (scoring.gsm8k, {"answer": "so #### 1,200"}, "5 + 5. The final answer is: 1200. Or 7", 1),
        (scoring.gsm8k, {"answer": "#### 7"}, "3 and then 7", 1),
        (scoring.gsm8k, {"answer": "#### 7"}, "7 and then 3", 0),
        (scoring.gsm8k, {"answer": "#### 7"}, "none", 0),
    ],
)
def test_task_rules_want_one_answer(rule, doc, answer, score):
    assert rule(doc, [answer]) == {"acc": float(score)}


def test_a_harness_task_runs_on_a_tiny_model(workspace, tmp_path, monkeypatch):
    import datasets

    rows = datasets.Dataset.from_list([{"sentence": "how do you make", "label": i % 2} for i in range(4)])
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.DatasetDict({"validation": rows}))
    settings = recipe(workspace, tmp_path, harmful_score=None, accuracy={"sst2": {"task": "tvac_sst2"}})
    found = run(settings)["models"]["base"]["sst2"]
    assert found["num_scored"] == 4
    assert found["percent"] == 0.0
    assert found["judge"] == "lm-evaluation-harness tvac_sst2, acc"
