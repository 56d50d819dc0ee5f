"""Tasks of lm-evaluation-harness: single ones, groups of them, and those that have no rate."""

from __future__ import annotations

import json
import weakref
from functools import partial

import lm_eval.tasks
import pytest
import yaml

from tests.evaluation.test_evaluate import recipe, run
from tvac_plugin.boundary.errors import UserError
from tvac_plugin.evaluation import harness
from tvac_plugin.evaluation.generation import Generator

QUESTIONS = {"part_a": 5, "part_b": 3, "filtered": 4, "lengths": 4, "fluent": 4}


def task(name, data, **changes):
    return {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": ["x", "the answer"], "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    } | changes  # fmt: skip


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder of tasks with their own data, and groups of them, in place of the package's."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, count in QUESTIONS.items():
        rows = [{"question": f"how do you make {i} ?", "label": i % 2} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rules.py").write_text(
        "def length(doc, results):\n    return {'length': 0.25 + doc['label'] / 2}\n"
        "def perplexity(doc, results):\n    return {'perplexity': (1.0, 2)}\n"
    )
    generated = {"output_type": "generate_until", "generation_kwargs": {"until": [], "max_gen_toks": 2}}
    exact = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    first = [{"name": name, "filter": [{"function": "take_first"}]} for name in ("strict", "lenient")]
    configs = [
        task("part_a", folder / "part_a.jsonl"), task("part_b", folder / "part_b.jsonl", tag="tagged"),
        task("filtered", folder / "filtered.jsonl", metric_list=exact, filter_list=first, **generated),
        {"group": "both", "task": ["part_a", "nested"], "aggregate_metric_list": [{"metric": "acc"}]},
        {"group": "nested", "task": ["tagged"]},
        {"group": "mixed", "task": ["part_a", "filtered"]},
    ]  # fmt: skip
    for number, config in enumerate(configs):
        (folder / f"{number}.yaml").write_text(yaml.safe_dump(config))
    for name, rule, metric, aggregation in (
        ("lengths", "length", "length", "mean"),
        ("fluent", "perplexity", "perplexity", "perplexity"),
    ):
        metrics = [{"metric": metric, "aggregation": aggregation, "higher_is_better": True}]
        text = yaml.safe_dump(task(name, folder / f"{name}.jsonl", metric_list=metrics, **generated))
        (folder / f"{name}.yaml").write_text(text + f"process_results: !function rules.{rule}\n")
    monkeypatch.setattr(harness, "TASKS", folder)
    # The thousands of tasks that come with the harness take seconds to list.
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))
    return folder


def measured(workspace, output, name, **options):
    base = str(workspace.root / "base")
    asked = {"models": {"one": base, "two": base}, "harmful_score": None, "accuracy": {"x": {"task": name, **options}}}
    found = run(recipe(workspace, output, **asked))["models"]
    assert found["one"] == found["two"], "the second model meets the same task"
    return found["one"]["x"]


def test_a_group_counts_all_items_of_its_tasks(workspace, tmp_path, tasks):
    both = measured(workspace, tmp_path / "both", "both")
    parts = [measured(workspace, tmp_path / name, name) for name in ("part_a", "part_b")]
    assert both["num_scored"] == 8
    assert both["percent"] == pytest.approx((5 * parts[0]["percent"] + 3 * parts[1]["percent"]) / 8, abs=1e-3)
    assert 0 < both["percent"] < 100
    assert both["low"] > 0, "Wilson's"
    assert both["judge"] == "lm-evaluation-harness both, acc over all items of 2 tasks"
    assert parts[0]["judge"] == "lm-evaluation-harness part_a, acc"
    assert measured(workspace, tmp_path / "few", "both", limit=2)["num_scored"] == 4


def test_an_item_counts_once_however_many_filters_its_task_has(workspace, tmp_path, tasks):
    found = measured(workspace, tmp_path, "filtered")
    assert found["num_scored"] == 4
    assert found["judge"] == "lm-evaluation-harness filtered, exact_match, strict"


def test_items_that_are_not_right_or_wrong_are_averaged(workspace, tmp_path, tasks):
    found = measured(workspace, tmp_path, "lengths")
    # 25, 75, 25 and 75: standard deviation 25, and 1.96 x 25 / 2
    assert (found["percent"], found["low"], found["high"]) == (50.0, 25.5, 74.5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mixed", "accuracy.x: the items of `mixed` have no score in common .*: part_a, filtered."),
        ("fluent", "accuracy.x: the items of `fluent` have no score in common"),
        ("gone", "accuracy.x: the evaluation harness has no task `gone`. Run `lm-eval ls tasks`."),
    ],
)
def test_what_has_no_rate_is_refused_before_a_model_is_loaded(workspace, tmp_path, tasks, monkeypatch, name, message):
    monkeypatch.setattr(Generator, "load", lambda *a, **k: pytest.fail("loaded a model"))
    with pytest.raises(UserError, match=message):
        run(recipe(workspace, tmp_path, accuracy={"x": {"task": name}}))


def test_the_harness_holds_on_to_no_model(workspace, tmp_path, tasks, monkeypatch):
    seen = []
    load = Generator.load

    def watched(path, **options):
        assert not any(ref() is not None for ref in seen), "the model before is still there"
        generator = load(path, **options)
        seen.append(weakref.ref(generator.model))
        return generator

    monkeypatch.setattr(Generator, "load", watched)
    measured(workspace, tmp_path, "both")
    assert [ref() for ref in seen] == [None, None]


def test_rejudging_takes_the_harness_s_rate_from_before(workspace, tmp_path, tasks, monkeypatch):
    settings = recipe(workspace, tmp_path, accuracy={"x": {"task": "part_a"}})
    first = run(settings)
    monkeypatch.setattr(Generator, "load", lambda *a, **k: pytest.fail("loaded a model"))
    assert run(settings, rejudge=True) == first
    changed = settings | {"accuracy": {"x": {"task": "part_a", "limit": 2}}}
    with pytest.raises(UserError, match=r"base.x.jsonl: the answers are to another task. Run without --rejudge."):
        run(changed, rejudge=True)
