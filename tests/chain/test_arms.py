"""Arms: what is compared when it is not one key that differs."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from tests.chain import fake
from tests.chain.conftest import STAGES
from tvac_plugin.cli import tvac
from tvac_plugin.report.pages import html, markdown
from tvac_plugin.report.tables import label
from tvac_plugin.report.terminal import chain_table

LISA = {"safety_defense": "none", "attack.safety_defense": "lisa"}
ARMS = [{"safety_defense": "none"}, {"safety_defense": "vaccine"}, LISA]
LISA_DATA = {"alignment_datasets": [{"path": "some/refusals", "type": "alpaca"}]}


def test_every_arm_meets_every_combination_and_shares_what_it_can(chain):
    plan = fake.fake_plan(chain(arms=ARMS, matrix={"seed": [1, 2]}, attack=LISA_DATA))
    assert [cell for cell, _ in plan.cells] == [arm | {"seed": seed} for arm in ARMS for seed in (1, 2)]
    assert [job.id for job in plan.jobs.values() if job.stage == "align" and job.kind == "train"] == [
        "align-safety_defense=none-seed=1", "align-safety_defense=none-seed=2",
        "align-safety_defense=vaccine-seed=1", "align-safety_defense=vaccine-seed=2",
    ]  # fmt: skip
    attack = plan.jobs["attack-safety_defense=none-attack.safety_defense=lisa-seed=2"]
    assert attack.parents == ("align-safety_defense=none-seed=2.merged",)
    assert attack.recipe["safety_defense"] == "lisa"


def test_the_order_of_an_arm_s_keys_and_of_the_arms_means_nothing(chain):
    arms = [{"align.x": 1, "safety_defense": "none"}, {"safety_defense": "none", "align.x": 1, "attack.y": 2}]
    ids = set(fake.fake_plan(chain(arms=arms, matrix={})).jobs)
    turned = [dict(reversed(arm.items())) for arm in reversed(arms)]
    assert set(fake.fake_plan(chain(arms=turned, matrix={})).jobs) == ids
    assert sum(job.startswith("align") and not job.endswith("merged") for job in ids) == 1


def test_an_arm_without_a_key_keeps_the_recipe_s_value(chain):
    plan = fake.fake_plan(chain(arms=[{"align.x": 1}, {"attack.y": 2}], matrix={}, align={"x": 7}))
    assert [plan.jobs[job].recipe["x"] for job in ("align-align.x=1", "align")] == [1, 7]


def test_results_of_arms_are_compared_seed_by_seed(chain):
    stages = [*STAGES[:2], {"name": "judge", "evaluate": "judge.yml", "models": ["attack"]}]
    results = fake.run(chain(arms=ARMS, matrix={"seed": [1, 2]}, attack=LISA_DATA, stages=stages), num_parallel=2)
    assert [label(entry) for entry in results["summary"]] == ["none", "vaccine", "none + attack.safety_defense=lisa"]
    scores = [cell["models"]["attack"]["harmful_score"]["percent"] for cell in results["cells"]]
    changes = [scores[2] - scores[0], scores[3] - scores[1]]
    none, vaccine, lisa = results["summary"]
    found = vaccine["against_none"]["attack"]["harmful_score"]
    assert [found["points"], found["min"], found["max"]] == pytest.approx([sum(changes) / 2, *sorted(changes)])
    assert none["against_none"] == {}
    assert "attack" in lisa["against_none"]
    for view in (" ".join(chain_table(results).split()), markdown(results), html(results)):
        assert "none + attack.safety_defense=lisa" in view
        assert "2 seeds" in view
        assert "mean of the differences of 2 seeds" in view
    assert "| vaccine, seed 2 | attack |" in markdown(results).partition("## Every run")[2]


def test_an_undefended_arm_needs_no_defense_anywhere(chain):
    always_lisa = LISA_DATA | {"safety_defense": "lisa"}
    results = fake.run(chain(arms=ARMS[:2], matrix={}, attack=always_lisa))
    assert [cell["defenses"] for cell in results["cells"]] == [
        {"attack": "lisa"}, {"align": "vaccine", "attack": "lisa"},
    ]  # fmt: skip
    assert all(entry["against_none"] == {} for entry in results["summary"])


def test_of_several_undefended_arms_the_most_alike_is_compared(chain):
    arms = [
        {"safety_defense": "none"},
        {"safety_defense": "none", "align.x": 1},
        {"safety_defense": "vaccine", "align.x": 1},
    ]
    none, other, vaccine = fake.run(chain(arms=arms, matrix={}))["summary"]
    scores = [entry["models"]["attack"]["harmful_score"]["percent"] for entry in (none, other, vaccine)]
    points = vaccine["against_none"]["attack"]["harmful_score"]["points"]
    assert points == pytest.approx(scores[2] - scores[1])
    assert points != pytest.approx(scores[2] - scores[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": []}, "arms: the list is empty. Give at least one arm or remove it."),
        ({"arms": [{}]}, "arms: entry 1 is empty. Give at least one key"),
        ({"arms": [{"safety_defense": "none"}]}, "arms: `safety_defense` is in `matrix:` too. Keep it in one of them."),
        ({"arms": [{"align.x": 1}, {"align.x": 1}]}, "arms: entry 2 repeats entry 1. Remove one."),
        ({"arms": [{"seed": [1, 2]}]}, "has several values. Give one, or move the key to `matrix:`."),
        ({"arms": [{"algin.x": 1}]}, "arms: `algin.x` is of no stage. Use safety_defense"),
        ({"arms": ["none"]}, "arms.0: Input should be a valid dictionary"),
        ({"arms": [{"safety_defense": "t-vaccine"}], "matrix": {}}, "Did you mean `t_vaccine`"),
    ],
)
def test_arms_that_cannot_run_are_refused(chain, changes, message):
    result = CliRunner().invoke(tvac, ["run", str(chain(**changes))])
    assert result.exit_code == 1, result.output
    assert message in result.output


def test_an_arm_can_fail_alone(chain):
    results = fake.run(chain(arms=[{"align.fail": True}, {"align.x": 2}], matrix={}, stages=STAGES))
    assert [cell["status"] for cell in results["cells"]] == ["failed", "finished"]
    assert "align.fail=True: FAILED" in chain_table(results)
