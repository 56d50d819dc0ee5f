"""A chain says which measure is the user's task, and its results have harm where that task has been learnt."""

from __future__ import annotations

import numpy as np
import pytest
from click.testing import CliRunner

from tests.chain import fake
from tests.chain.conftest import JUDGE, STAGES
from tvac_plugin.cli import tvac
from tvac_plugin.report.pages import html, markdown
from tvac_plugin.report.terminal import chain_table

PROMPTS = {"prompts": {"path": "held_out.jsonl"}}
ACCURACY = {"accuracy": {"task": PROMPTS, "benign": PROMPTS}}

NONE = {"safety_defense": ["none"]}


def percents(cell, measure):
    rows = [cell["models"]["align"], *cell["curves"]["attack"]]
    return [row[measure]["percent"] for row in rows]


def walked(cell, target, measure):
    """Harm at the first of many places on the way at which the task is at the target."""
    steps, walk = [0, 10, 20], np.linspace(0, 20, 2_000_001)
    there = np.nonzero(np.interp(walk, steps, percents(cell, measure)) >= target)[0]
    return None if len(there) == 0 else np.interp(walk[there[0]], steps, percents(cell, "harmful_score"))


@pytest.mark.parametrize(("changes", "measure"), [({}, "task"), ({"utility": "benign"}, "benign")])
def test_results_have_harm_at_matched_utility(chain, changes, measure):
    path = chain(judge=ACCURACY, matrix={"safety_defense": ["none", "vaccine", "t_vaccine"], "seed": [1, 2]}, **changes)
    results = fake.run(path, num_parallel=2)
    assert results["utility"] == measure
    best = {cell["params"]["seed"]: max(percents(cell, measure)) for cell in results["cells"][:2]}
    harms = []
    for cell in results["cells"]:
        assert cell["starts"] == {"attack": "align"}
        found = cell["matched_utility"]["attack"]
        for at in found["at"]:
            expected = walked(cell, at["share"] / 100 * best[cell["params"]["seed"]], measure)
            harms.append(at["harmful_score"] and at["harmful_score"]["percent"])
            assert harms[-1] == (None if expected is None else pytest.approx(expected, abs=0.01))
    assert any(harm is not None for harm in harms)
    assert [entry["defended"] for entry in results["summary"]] == [False, True, True]
    curve = results["summary"][0]["utility_curves"]["attack"]
    assert [point["step"] for point in curve] == [0, 10, 20]
    means = [sum(pair) / 2 for pair in zip(*(percents(cell, measure) for cell in results["cells"][:2]), strict=True)]
    assert [point["utility"]["percent"] for point in curve] == pytest.approx(means, abs=1e-3)
    for view in (chain_table(results), markdown(results), html(results)):
        assert "of the undefended user&#39;s task" in view or "of the undefended user's task" in view


def test_without_a_measure_of_the_task_nothing_is_matched(chain):
    results = fake.run(chain(judge={"accuracy": {"benign": PROMPTS}}))
    assert [cell["matched_utility"] for cell in results["cells"]] == [{}, {}]
    assert results["summary"][1]["matched_utility"] == results["summary"][1]["utility_curves"] == {}
    assert "matched" not in markdown(results)


def test_harm_and_task_of_two_evaluations_make_one_curve(chain, tmp_path):
    task_only = {key: value for key, value in (JUDGE | ACCURACY).items() if key != "harmful_score"}
    path = chain(matrix=NONE, stages=[*STAGES, STAGES[2] | {"name": "tasks", "evaluate": "tasks.yml"}])
    (tmp_path / "tasks.yml").write_text(str(task_only))
    (cell,) = fake.run(path)["cells"]
    assert [sorted(point) for point in cell["curves"]["attack"]] == [["benign", "harmful_score", "step", "task"]] * 2
    assert cell["matched_utility"]["attack"]["at"]


def test_an_attack_starts_from_the_model_that_stands_in(chain):
    lox = {"name": "extrapolate", "lox": {"coefficient": 0}, "model_from": "align"}
    stages = [STAGES[0], lox, STAGES[1] | {"model_from": "extrapolate"}, STAGES[2]]
    (cell,) = fake.run(chain(judge=ACCURACY, matrix={}, stages=stages))["cells"]
    assert cell["starts"] == {"attack": "align"}


def test_an_attack_on_the_base_model_starts_from_it(chain):
    attack = {"name": "attack", "train": "attack.yml"}
    stages = [attack, STAGES[2] | {"models": ["base", "attack"]}]
    (cell,) = fake.run(chain(judge=ACCURACY, matrix={}, stages=stages))["cells"]
    assert cell["starts"] == {"attack": "base"}
    other = [STAGES[0], attack, STAGES[2]]
    (cell,) = fake.run(chain(judge=ACCURACY, matrix={}, stages=other, output_dir="other"))["cells"]
    assert cell["starts"] == {}, "base is what alignment starts from, and this attack starts from another model"


def test_an_aligned_model_that_is_not_evaluated_is_no_point(chain):
    stages = [*STAGES[:2], STAGES[2] | {"models": ["attack"]}]
    (cell,) = fake.run(chain(judge=ACCURACY, matrix=NONE, stages=stages))["cells"]
    assert cell["starts"] == {}
    assert cell["matched_utility"]["attack"]["at"][0]["step"] >= 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"utility": "tsk"}, "utility: no evaluation of an attack has a measure `tsk`. Did you mean `task`?"),
        ({"utility": "harmful_score"}, "has a measure `harmful_score`. Use one of: benign, task."),
        ({"utility": "task", "judge": {}}, "has a measure `task`. Add it to `accuracy:` of one."),
        (
            {"utility": "task", "stages": [*STAGES[:2], STAGES[2] | {"models": ["align"]}]},
            "no evaluation of an attack has a measure `task`. Add it",
        ),
        (
            {"utility": "task", "stages": [*STAGES[:2], STAGES[2] | {"checkpoints": False}]},
            "utility: `task` is not measured during an attack. Add `checkpoints: true` to its evaluation.",
        ),
        ({"utility": 3}, "utility: Input should be a valid string"),
    ],
)
def test_a_task_that_no_attack_is_measured_on_is_refused_before_anything_starts(chain, tmp_path, changes, message):
    result = CliRunner().invoke(tvac, ["run", str(chain(**{"judge": ACCURACY} | changes))])
    assert result.exit_code == 1, result.output
    assert message in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", [{}, {"utility": "task"}, {"utility": "benign"}])
def test_a_task_that_an_attack_is_measured_on_is_accepted(chain, changes):
    result = CliRunner().invoke(tvac, ["run", str(chain(judge=ACCURACY, **changes)), "--dry-run"])
    assert "utility" not in result.output
