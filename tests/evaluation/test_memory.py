"""No two models or judges are in memory together, and what was generated outlives a judge that fails."""

from __future__ import annotations

import gc
import json
import weakref
from typing import ClassVar

import pytest

from tests.evaluation.test_evaluate import recipe, run
from tvac_plugin.boundary.errors import UserError
from tvac_plugin.evaluation.generation import Generator
from tvac_plugin.evaluation.judges import JUDGES, Judge, Verdict


class Heavy:
    """Only the garbage collector frees it, like a model with hooks on itself."""

    alive: ClassVar = weakref.WeakSet()
    log: ClassVar = []

    def __init__(self, name):
        assert not Heavy.alive, f"{name} is loaded beside {list(Heavy.alive)}"
        Heavy.alive.add(self)
        Heavy.log.append(name)
        self.name, self.itself = name, self

    def __repr__(self):
        return self.name


class FakeGenerator(Heavy):
    def prompt(self, text):
        return text

    def complete(self, texts, **_):
        return [f"{self.name} says {text}" for text in texts]


class FakeJudge(Heavy, Judge):
    def read(self, exchanges, *, batch_size):
        return [Verdict(harmful=True, refused=False) for _ in exchanges]


@pytest.fixture
def heavy(monkeypatch):
    monkeypatch.setattr(Heavy, "alive", weakref.WeakSet())
    monkeypatch.setattr(Heavy, "log", [])
    monkeypatch.setattr(Generator, "load", lambda path, **_: FakeGenerator(f"model {path.name}"))
    monkeypatch.setattr(
        "tvac_plugin.evaluation.evaluate.load_judge",
        lambda name, *, threshold, **_: FakeJudge(f"judge {name} {threshold}"),
    )
    gc.disable()
    yield Heavy
    gc.enable()


def settings(workspace, tmp_path, **changes):
    prompts = {"path": str(workspace.root / "held_out.jsonl")}
    for name in ("a", "b"):
        (tmp_path / name).mkdir(exist_ok=True)
    measures = {
        "harmful_score": {"judge": "beaver_dam", "prompts": prompts},
        "over_refusal": {"judge": "wildguard", "prompts": prompts},
    }
    models = {name: str(tmp_path / name) for name in ("a", "b")}
    return recipe(workspace, tmp_path / "out", models=models, **measures | changes)


def test_all_models_answer_one_by_one_and_then_all_judges_read_one_by_one(workspace, tmp_path, heavy):
    results = run(settings(workspace, tmp_path))
    assert heavy.log == ["model a", "model b", "judge beaver_dam None", "judge wildguard None"]
    assert not heavy.alive
    for model in ("a", "b"):
        assert list(results["models"][model]) == ["harmful_score", "over_refusal", "benign"]
        assert list(results["models"][model]["harmful_score"]) == [
            "percent", "low", "high", "num_scored", "num_unscored", "judge", "judge_note", "num_neither",
            "prompts_sha256",
        ]  # fmt: skip
        (first, *_) = (tmp_path / "out" / "answers" / f"{model}.harmful_score.jsonl").read_text().splitlines()
        assert json.loads(first)["answer"].startswith(f"model {model} says")
        assert json.loads(first)["harmful"] is True


def test_a_judge_of_two_measures_is_loaded_once_for_each_threshold(workspace, tmp_path, heavy):
    prompts = {"path": str(workspace.root / "held_out.jsonl")}
    same = {"judge": "beaver_dam", "prompts": prompts}
    run(settings(workspace, tmp_path, harmful_score=same, over_refusal=same))
    assert heavy.log == ["model a", "model b", "judge beaver_dam None"]
    heavy.log.clear()
    run(settings(workspace, tmp_path, harmful_score={**same, "threshold": 0.3}, over_refusal=same))
    assert heavy.log == ["model a", "model b", "judge beaver_dam 0.3", "judge beaver_dam None"]


def test_a_judge_that_cannot_be_loaded_loses_no_answer(workspace, tmp_path, heavy, monkeypatch):
    with monkeypatch.context() as patch:

        def missing(*_, **__):
            raise OSError("no such weights.")

        patch.setattr("tvac_plugin.evaluation.evaluate.load_judge", missing)
        with pytest.raises(UserError, match=f"judge beaver_dam: {JUDGES['beaver_dam'].weights} cannot be loaded.*"
                                            "The answers are kept: --rejudge reads them."):  # fmt: skip
            run(settings(workspace, tmp_path))
    assert heavy.log == ["model a", "model b"]
    assert len(list((tmp_path / "out" / "answers").iterdir())) == 6
    heavy.log.clear()
    assert run(settings(workspace, tmp_path), rejudge=True)["models"]["b"]["harmful_score"]["percent"] == 100.0
    assert heavy.log == ["judge beaver_dam None", "judge wildguard None"]


def test_a_missing_model_is_said_before_another_has_answered(workspace, tmp_path, heavy):
    models = {"a": str(tmp_path / "a"), "gone": "./gone"}
    with pytest.raises(UserError, match=r"models.gone: ./gone does not exist. Train it first"):
        run(settings(workspace, tmp_path) | {"models": models})
    assert heavy.log == []


def test_answers_cut_short_are_named_when_they_are_read_again(workspace, tmp_path, heavy):
    run(settings(workspace, tmp_path))
    path = tmp_path / "out" / "answers" / "a.over_refusal.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=f"{path}, line 6 is cut off. Restore or remove it. Or run without --rejudge."):
        run(settings(workspace, tmp_path), rejudge=True)


def test_real_models_are_freed_too(workspace, tmp_path, monkeypatch):
    seen = []
    load = Generator.load

    def watched(path, **options):
        assert not any(ref() is not None for ref in seen), "the model before is still there"
        generator = load(path, **options)
        seen.append(weakref.ref(generator.model))
        return generator

    def judge(*_, **__):
        assert not any(ref() is not None for ref in seen)
        return FakeJudge("judge")

    monkeypatch.setattr(Generator, "load", watched)
    monkeypatch.setattr("tvac_plugin.evaluation.evaluate.load_judge", judge)
    base = str(workspace.root / "base")
    retention = {"prompts": {"path": str(workspace.root / "alignment.jsonl")}, "of": base}
    run(recipe(workspace, tmp_path, models={"a": base, "b": base}, retention=retention))
    assert len(seen) == 3
