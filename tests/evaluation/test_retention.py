"""Retention: against a loss written out row by row, what batches change, its interval, and damaged losses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.evaluation.test_evaluate import recipe, run
from tests.support.models import tiny_model
from tvac_plugin.evaluation import retention as module
from tvac_plugin.evaluation.generation import Generator
from tvac_plugin.evaluation.prompts import Prompt, load_prompts
from tvac_plugin.evaluation.recipe import PromptSource
from tvac_plugin.evaluation.retention import AnswerLoss, RowLoss, answer_losses, retention, row_losses


@pytest.fixture
def generator(workspace):
    return Generator.load(workspace.root / "base")


@pytest.fixture
def prompts(workspace):
    found = load_prompts(PromptSource(path=str(workspace.root / "alignment.jsonl"), num_prompts=7))
    return [*found, Prompt(found[0].text * 3, f" {found[-1].reference} again ", {})]


def straight_line(generator, prompt):
    """Minus the log-probability of every answer token, given all before it."""
    asked = generator.tokenizer(generator.prompt(prompt.text), add_special_tokens=False).input_ids
    whole = generator.tokenizer(generator.prompt(prompt.text) + prompt.reference.strip(), add_special_tokens=False)
    ids = whole.input_ids
    assert ids[: len(asked)] == asked
    with torch.no_grad():
        probabilities = generator.model(torch.tensor([ids])).logits[0].double().softmax(-1)
    positions = range(len(asked), len(ids))
    return -sum(float(probabilities[i - 1, ids[i]].log()) for i in positions), len(positions)


def test_the_loss_is_that_of_the_answer_s_tokens_alone(generator, prompts):
    found = answer_losses(generator, prompts, batch_size=3, description="x")
    for row, prompt in zip(found, prompts, strict=True):
        loss, num_tokens = straight_line(generator, prompt)
        assert row.num_tokens == num_tokens > 1
        assert row.loss == pytest.approx(loss, rel=1e-5)


def test_batches_change_no_loss(generator, prompts):
    one, many = (answer_losses(generator, prompts, batch_size=size, description="x") for size in (1, 8))
    assert [row.loss for row in one] == pytest.approx([row.loss for row in many], rel=1e-5)


def test_a_prompt_s_tokens_are_not_projected(generator, prompts):
    shapes = []
    handle = generator.model.lm_head.register_forward_hook(lambda _m, _i, output: shapes.append(output.shape[:-1]))
    found = answer_losses(generator, prompts, batch_size=8, description="x")
    handle.remove()
    assert shapes[-1] == (1, sum(row.num_tokens for row in found))


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_positions_and_capped_logits_are_the_model_s_own(generator, prompts, family):
    other = Generator(tiny_model(family, vocab_size=len(generator.tokenizer)), generator.tokenizer)
    found = answer_losses(other, prompts, batch_size=8, description="x")
    expected = [straight_line(other, prompt)[0] for prompt in prompts]
    assert [row.loss for row in found] == pytest.approx(expected, rel=1e-4)


def test_a_head_that_must_see_all_tokens_gives_the_same(generator, prompts, monkeypatch):
    expected = answer_losses(generator, prompts, batch_size=4, description="x")
    monkeypatch.setattr(module, "find_answer_head", lambda model: None)
    found = answer_losses(generator, prompts, batch_size=4, description="x")
    assert [row.loss for row in found] == pytest.approx([row.loss for row in expected], rel=1e-5)


def test_the_ratio_is_of_means_per_token_and_its_interval_resamples_rows():
    draw = np.random.default_rng(1)
    base = draw.uniform(5, 50, 300)
    factors = draw.normal(1.5, 0.2, 300)
    rows = [RowLoss(10, float(b * f), float(b)) for b, f in zip(base, factors, strict=True)]
    found = retention(rows)
    ratio = float((base * factors).sum() / base.sum())
    # the delta method for a ratio of means
    error = float(np.std(base * (factors - ratio), ddof=1) / base.mean() / 300**0.5)
    assert found["ratio"] == pytest.approx(ratio, abs=1e-4)
    assert found["loss"] == pytest.approx((base * factors).sum() / 3000, abs=1e-4)
    assert found["base_loss"] == pytest.approx(base.sum() / 3000, abs=1e-4)
    assert (found["low"], found["high"]) == pytest.approx((ratio - 1.96 * error, ratio + 1.96 * error), abs=error / 4)
    assert (found["num_rows"], found["num_tokens"]) == (300, 3000)
    assert retention(rows) == found


def test_long_answers_count_by_their_tokens():
    found = retention([RowLoss(1, 2.0, 1.0), RowLoss(99, 99.0, 99.0)])
    assert (found["loss"], found["base_loss"], found["ratio"]) == (1.01, 1.0, 1.01)


def test_a_model_against_itself_has_lost_nothing(generator, prompts):
    losses = answer_losses(generator, prompts, batch_size=4, description="x")
    found = retention(row_losses(losses, losses, what="x"))
    assert (found["ratio"], found["low"], found["high"]) == (1.0, 1.0, 1.0)


def test_losses_that_say_nothing_are_refused():
    good, bad = AnswerLoss(3.0, 2), AnswerLoss(float("nan"), 2)
    with pytest.raises(ValueError, match="m, retention: the loss of 1 of 2 answers is not finite.*Train this model"):
        row_losses([good, bad], [good, good], what="m, retention")
    with pytest.raises(ValueError, match="m, retention: the tokenizer differs.*Name the model"):
        row_losses([good], [AnswerLoss(3.0, 4)], what="m, retention")


def retained(workspace, tmp_path, **changes):
    source = {"prompts": {"path": str(workspace.root / "alignment.jsonl")}, "of": str(workspace.root / "base")}
    return recipe(workspace, tmp_path, accuracy={}, harmful_score=None, retention=source | changes)


def other_model(workspace, folder):
    generator = Generator.load(workspace.root / "base")
    with torch.no_grad():
        generator.model.lm_head.weight.mul_(1.5)
    generator.model.save_pretrained(folder)
    generator.tokenizer.save_pretrained(folder)
    return str(folder)


def test_an_evaluation_holds_every_model_against_the_one_before_alignment(workspace, tmp_path, monkeypatch):
    models = {"base": str(workspace.root / "base"), "other": other_model(workspace, tmp_path / "other")}
    settings = retained(workspace, tmp_path / "out") | {"models": models}
    results = run(settings)
    base, other = (results["models"][name]["retention"] for name in models)
    assert list(base) == [
        "loss", "base_loss", "ratio", "low", "high", "num_rows", "num_tokens", "of", "prompts_sha256",
    ]  # fmt: skip
    assert (base["ratio"], base["low"], base["high"]) == (1.0, 1.0, 1.0)
    assert other["base_loss"] == base["loss"]
    assert other["ratio"] == pytest.approx(other["loss"] / base["loss"], abs=1e-3)
    assert other["ratio"] > 1
    assert other["low"] < other["ratio"] < other["high"]
    assert results == json.loads((tmp_path / "out" / "evaluation.json").read_text())

    monkeypatch.setattr(Generator, "load", lambda *a, **k: pytest.fail("loaded a model"))
    assert run(settings, rejudge=True) == results
    with pytest.raises(ValueError, match="of other answers or another model. Run without --rejudge"):
        run(retained(workspace, tmp_path / "out", of="./else") | {"models": models}, rejudge=True)
    path = tmp_path / "out" / "answers" / "other.retention.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{path}, line .* is cut off. Restore or remove it. Or run without"):
        run(settings, rejudge=True)
    path.unlink()
    with pytest.raises(ValueError, match="Run without --rejudge first"):
        run(settings, rejudge=True)


def test_a_model_whose_weights_are_not_finite_gets_no_number(workspace, tmp_path):
    generator = Generator.load(workspace.root / "base")
    with torch.no_grad():
        generator.model.lm_head.weight.fill_(float("nan"))
    generator.model.save_pretrained(tmp_path / "nan")
    generator.tokenizer.save_pretrained(tmp_path / "nan")
    settings = retained(workspace, tmp_path / "out") | {"models": {"nan": str(tmp_path / "nan")}}
    with pytest.raises(ValueError, match="nan, retention: the loss of .* is not finite"):
        run(settings)
    assert not (tmp_path / "out" / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"of": None}, "retention: `of:` is missing. Name the folder or hub id of the model before alignment"),
        ({"of": "./gone"}, "retention.of: ./gone does not exist. Make it first"),
        ({"prompts": {"path": "gone.jsonl"}}, "retention.prompts: gone.jsonl, it does not exist"),
        ({"prompts": {"path": "one.jsonl"}}, "one.jsonl has 1 prompt, and an interval needs 2. Add more"),
        ({"prompts": {"path": "empty.jsonl"}}, "line 2 has no answer to compare with. Add"),
        ({"off": "x"}, "retention: unknown key `off`. Did you mean `of`"),
    ],
)
def test_mistakes_are_said_before_a_model_loads(workspace, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Generator, "load", lambda *a, **k: pytest.fail("loaded a model"))
    rows = [{"messages": [{"content": text}, {"content": answer}]} for text, answer in (("a", "b"), ("c", " "))]
    (tmp_path / "one.jsonl").write_text(json.dumps(rows[0]) + "\n")
    (tmp_path / "empty.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=message):
        run(retained(workspace, tmp_path / "out", **changes))
