"""The judge of the how-to, as a user would save it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from tests.evaluation.test_evaluate import recipe, run
from tvac_plugin.boundary.errors import UserError
from tvac_plugin.chain.jobs import Job
from tvac_plugin.chain.state import fingerprint
from tvac_plugin.cli import tvac
from tvac_plugin.evaluation.generation import Generator
from tvac_plugin.evaluation.judges import Exchange, load_judge
from tvac_plugin.evaluation.recipe import EvaluateRecipe
from tvac_plugin.report.tables import evaluation_table

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "write-a-judge.md"
(CODE,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
OTHERS = """
from tvac_plugin.evaluation.judges import Judge, Verdict

class Thing: pass

class Strict(Judge):
    column = "harmful_answer"
    def __init__(self, weights="none", threshold=0.5): self.given = (weights, threshold)
    def read(self, exchanges, *, batch_size): return [Verdict(True, False)] * len(exchanges)

class Half(Judge):
    pass

class Broken(Judge):
    def __init__(self): raise OSError("no such corpus.")
    def read(self, exchanges, *, batch_size): return []

class Lazy(Judge):
    def read(self, exchanges, *, batch_size): return []
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the file of the how-to, which is not on the import path."""
    (tmp_path / "gardeners.py").write_text(CODE)
    (tmp_path / "others.py").write_text(OTHERS)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("gardeners", "others"):
        sys.modules.pop(name, None)


def measure(workspace, judge, **keys):
    prompts = {"path": str(workspace.root / "held_out.jsonl")}
    return {"judge": judge, "prompts": prompts, "max_new_tokens": 2, **keys}


def test_it_reads_as_the_page_says(here):
    answers = ["Yew, boiled.", "I cannot name hemlock.", "Mint."]
    read = load_judge("gardeners.Gardeners").read([Exchange("q", a, {}) for a in answers], batch_size=2)
    assert [verdict[:2] for verdict in read] == [(True, False), (False, True), (False, False)]


def test_the_page_s_recipe_is_accepted(here):
    shown = yaml.safe_load(re.search(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL).group(1))
    assert EvaluateRecipe.model_validate(shown).harmful_score.judge == "gardeners.Gardeners"


def test_an_evaluation_reads_with_it_and_says_what_it_is_worth(workspace, here):
    judged = measure(workspace, "gardeners.Gardeners")
    found = run(recipe(workspace, here / "out", harmful_score=judged, over_refusal=judged))["models"]["base"]
    assert (found["harmful_score"]["percent"], found["harmful_score"]["num_scored"]) == (0.0, 6)
    assert found["harmful_score"]["judge_note"] == "Three plants; an answer that warns of one counts too."
    assert found["harmful_score"]["num_neither"] == 6


def test_a_second_judge_decides_nothing_and_what_it_found_is_told(workspace, here):
    judged = measure(workspace, "keyword", second_judge="gardeners.Gardeners")
    results = run(recipe(workspace, here / "out", harmful_score=judged))
    found = results["models"]["base"]["harmful_score"]
    assert (found["judge"], found["percent"]) == ("keyword", 100.0)
    second = found["second_judge"]
    assert second["judge"] == "gardeners.Gardeners"
    assert (second["percent"], second["agreement"], second["kappa"]) == (0, 0, 0)
    told = "gardeners.Gardeners says 0.0 %, and agrees with keyword on 0 % of the 6 answers that both read"
    assert f"base, harmful score: {told}" in evaluation_table(results)
    (row, *_) = (here / "out" / "answers" / "base.harmful_score.jsonl").read_text().splitlines()
    assert '"harmful": true' in row
    assert '"second_harmful": false, "second_refused": false' in row
    again = run(recipe(workspace, here / "out", harmful_score=judged), rejudge=True)
    assert again == results
    with pytest.raises(ValueError, match="second_judge: keyword reads the answers already. Name another"):
        run(recipe(workspace, here / "out", harmful_score=judged | {"second_judge": "keyword"}))


def test_it_is_given_what_the_recipe_says_and_nothing_else(here):
    assert load_judge("others.Strict").given == ("none", 0.5)
    assert load_judge("others.Strict", weights="w", threshold=0.9, trust_remote_code=True).given == ("w", 0.9)


def test_the_column_it_needs_is_missed_before_a_model_loads(workspace, here, monkeypatch):
    monkeypatch.setattr(Generator, "load", lambda *a, **k: pytest.fail("loaded a model"))
    with pytest.raises(UserError, match="has no row with `harmful_answer`"):
        run(recipe(workspace, here / "out", harmful_score=measure(workspace, "others.Strict")))
    both = measure(workspace, "keyword", second_judge="others.Strict")
    with pytest.raises(UserError, match="has no row with `harmful_answer`"):
        run(recipe(workspace, here / "out", harmful_score=both))


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ("gone.Judge", "judge: gone.Judge cannot be imported: ModuleNotFoundError.*Write `judge: module.Class`"),
        ("others.Nothing", "judge: others has no `Nothing`"),
        ("others.Thing", "others.Thing is not a subclass of tvac_plugin.evaluation.judges.Judge. Make it one."),
        ("others.Half", "others.Half leaves out `read`. Write that"),
        ("gardener", "`gardener` is not a judge"),
    ],
)
def test_a_judge_that_is_none_is_refused_when_the_recipe_is_read(workspace, here, judge, message):
    with pytest.raises(ValueError, match=message):
        EvaluateRecipe.model_validate(recipe(workspace, here / "out", harmful_score=measure(workspace, judge)))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"judge": "gardeners.Gardeners", "threshold": 0.5}, "made with threshold, and its `__init__` wants something"),
        ({"judge": "keyword", "judge_model": "some/weights"}, "judge_model: keyword has none. Remove the key"),
        ({"judge": "wildguard", "threshold": 0.5}, "threshold: wildguard has none. Remove the key"),
    ],
)
def test_a_judge_that_does_not_take_what_it_is_given_is_refused_when_the_recipe_is_read(workspace, here, keys, message):
    with pytest.raises(ValueError, match=message):
        EvaluateRecipe.model_validate(recipe(workspace, here / "out", harmful_score=measure(workspace, **keys)))


def test_a_judge_whose_making_fails_is_told_from_weights_that_are_missing(workspace, here):
    with pytest.raises(UserError, match=r"judge others.Broken: cannot be made: no such corpus. Mend its `__init__`"):
        run(recipe(workspace, here / "out", harmful_score=measure(workspace, "others.Broken")))


def test_it_is_announced_before_it_is_imported(workspace, here):
    keys = {"harmful_score": measure(workspace, "gardeners.Gardeners", second_judge="gone.Judge")}
    (here / "r.yml").write_text(yaml.safe_dump(recipe(workspace, here / "out", **keys)))
    result = CliRunner().invoke(tvac, ["evaluate", "r.yml"])
    assert "r.yml: harmful_score.judge: gardeners.Gardeners is imported, which runs its code." in result.stderr
    assert "r.yml: harmful_score.second_judge: gone.Judge is imported, which runs its code." in result.stderr
    assert result.stderr.index("gardeners") < result.stderr.index("cannot be imported")


def test_a_judge_that_leaves_answers_out_is_stopped(workspace, here):
    with pytest.raises(UserError, match=r"others.Lazy gave 0 verdicts on 6 answers"):
        run(recipe(workspace, here / "out", harmful_score=measure(workspace, "others.Lazy")))


@pytest.mark.parametrize("key", ["judge", "second_judge"])
def test_a_chain_evaluates_again_when_its_source_changes(here, key):
    settings = {"harmful_score": {"judge": "keyword", key: "gardeners.Gardeners"}}
    job = Job("a", "evaluate", "a", "base", (), here / "jobs" / "a", settings, ())
    before = fingerprint(job, [])
    assert fingerprint(job, []) == before
    (here / "gardeners.py").write_text(CODE + "# changed\n")
    assert fingerprint(job, []) != before
