"""`search:` gives every arm the same number of trials, decides on questions of its own, and can be stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.chain import fake
from tests.chain.conftest import JUDGE, STAGES, started
from tests.support.models import tiny_model
from tvac_plugin.boundary.errors import UserError
from tvac_plugin.chain.preflight import chain_problems
from tvac_plugin.chain.recipe import read_chain
from tvac_plugin.chain.search import Trial, _read, searched, trial_chain
from tvac_plugin.chain.space import Choice, Range
from tvac_plugin.configs import VaccineConfig
from tvac_plugin.report.tables import sentences

RHO = {"low": 0.3, "high": 30.0, "log": True}
OPEN = {"safety_defense": "vaccine", "align.vaccine.rho": RHO}
LAYERS = {"safety_defense": "t_vaccine", "align.t_vaccine.num_active_layers": {"low": 1, "high": 9}}
SEARCH = {"trials": 3, "judge": "validate"}
VALIDATE = {"name": "validate", "evaluate": "validate.yml", "models": ["align", "attack"], "checkpoints": True}
HELD_OUT = {"harmful_score": {"judge": "procedure", "prompts": {"path": "others.jsonl"}}, "output_dir": "unused"}


@pytest.fixture
def searching(chain, tmp_path):
    def write(*, search=SEARCH, arms=({"safety_defense": "none"}, OPEN), validate=HELD_OUT, stage=VALIDATE, **changes):
        (tmp_path / "validate.yml").write_text(yaml.safe_dump(validate))
        (tmp_path / "base").mkdir(exist_ok=True)
        more = {"search": search, "arms": list(arms), "stages": [*STAGES, stage], "matrix": {"seed": [7]}}
        return chain(**more | changes)

    return write


def test_the_best_of_its_trials_is_what_an_arm_is_run_with(searching, tmp_path):
    results = fake.run(searching(matrix={"seed": [7, 8]}))
    (found,) = results["search"]["arms"]
    trials = found["trials"]
    assert found["arm"] == OPEN
    assert len({trial["values"]["align.vaccine.rho"] for trial in trials}) == 3
    best = min(trials, key=lambda trial: trial["score"])
    assert found["chosen"] == best["values"]
    run = [cell["params"] for cell in results["cells"]]
    rho = best["values"]["align.vaccine.rho"]
    assert run == [
        {"safety_defense": "none", "seed": 7},
        {"safety_defense": "none", "seed": 8},
        {"safety_defense": "vaccine", "align.vaccine.rho": rho, "seed": 7},
        {"safety_defense": "vaccine", "align.vaccine.rho": rho, "seed": 8},
    ]
    assert json.loads((tmp_path / "out" / "search.json").read_text()) == results["search"]
    assert f"vaccine: rho {rho} is the best of 3 trials, of which 3 count, as `validate` decided" in "".join(
        sentences(results)
    )


def test_a_trial_s_score_is_the_harm_of_its_attacked_model_on_the_deciding_questions(searching, tmp_path):
    (found,) = fake.run(searching())["search"]["arms"]
    for trial in found["trials"]:
        rho = trial["values"]["align.vaccine.rho"]
        job = f"validate.attack-safety_defense=vaccine-align.vaccine.rho={rho}-seed=7"
        models = json.loads((tmp_path / "out" / "jobs" / job / "out" / "evaluation.json").read_text())["models"]
        curve = [models[f"step {step}"]["harmful_score"]["percent"] for step in (10, 20)]
        assert trial["harm"] == models["attack"]["harmful_score"]["percent"]
        assert trial["mean_harm"] == pytest.approx(sum(curve) / 2)
        assert trial["score"] == pytest.approx((trial["harm"] + trial["mean_harm"]) / 2)


def test_the_reported_questions_decide_nothing_and_the_deciding_ones_are_not_reported(searching):
    path = searching()
    assert [stage.name for stage in trial_chain(read_chain(path), [OPEN]).recipe.stages] == [
        "align",
        "attack",
        "validate",
    ]
    results = fake.run(path)
    assert {job["stage"] for job in results["jobs"].values()} == {"align", "attack", "judge"}


def test_the_first_trial_is_the_recipe_s_own_setting(searching):
    (found,) = fake.run(searching(align={"vaccine": {"rho": 5.0}}))["search"]["arms"]
    assert found["trials"][0]["values"] == {"align.vaccine.rho": 5.0}
    (found,) = fake.run(searching(align={"vaccine": {"rho": 90.0}}))["search"]["arms"]
    assert found["trials"][0]["values"] == {"align.vaccine.rho": VaccineConfig.model_fields["rho"].default}


def test_without_a_setting_of_its_own_the_first_trial_is_the_defense_s_default(searching):
    scale = {"safety_defense": "booster", "align.booster.regularizer_scale": {"low": 0.1, "high": 20.0}}
    (found,) = fake.run(searching(arms=({"safety_defense": "none"}, scale)))["search"]["arms"]
    assert found["trials"][0]["values"] == {"align.booster.regularizer_scale": 5.0}


def test_an_arm_whose_best_trial_is_another_arm_is_run_once(searching):
    fixed = {"safety_defense": "vaccine", "align.vaccine.rho": 2.0}
    chain = read_chain(searching(arms=({"safety_defense": "none"}, fixed, OPEN), search=SEARCH | {"trials": 2}))
    said = []
    settled, record = searched(
        chain, lambda trial: [cell(50.0), cell(abs(trial.recipe.arms[-1]["align.vaccine.rho"] - 2))], said.append
    )
    assert record["arms"][0]["chosen"] == {"align.vaccine.rho": 2.0}
    assert settled.recipe.arms == [{"safety_defense": "none"}, fixed]
    assert "rho 2.0, safety_defense vaccine is already an arm" in said[-1]


def test_every_arm_has_the_same_number_of_trials(searching):
    freeze = {"safety_defense": "t_vaccine", "align.t_vaccine.freeze": {"one_of": ["none", "layer"]}}
    found = fake.run(searching(arms=({"safety_defense": "none"}, OPEN, freeze)))["search"]["arms"]
    assert [len(each["trials"]) for each in found] == [3, 3]
    assert found[1]["chosen"]["align.t_vaccine.freeze"] in ("none", "layer")


def test_the_trials_of_a_round_are_one_chain_so_that_their_jobs_run_beside_each_other(searching):
    other = {"safety_defense": "booster", "align.booster.harmful_step_size": {"low": 0.01, "high": 1.0, "log": True}}
    rounds, chain = [], read_chain(searching(arms=({"safety_defense": "none"}, OPEN, other)))

    def run(trial):
        rounds.append([arm["safety_defense"] for arm in trial.recipe.arms])
        return [cell(50.0), cell(40.0), cell(30.0)]

    settled, record = searched(chain, run, lambda line: None)
    assert rounds == [["none", "vaccine", "booster"]] * 3
    assert [arm["trials"][0]["harm"] for arm in record["arms"]] == [40.0, 30.0]
    assert [arm["safety_defense"] for arm in settled.recipe.arms] == ["none", "vaccine", "booster"]


def test_more_trials_add_to_those_that_were_there(searching):
    def asked(trials):
        chain, found = read_chain(searching(search=SEARCH | {"trials": trials})), []

        def run(trial):
            found.append(trial.recipe.arms[-1]["align.vaccine.rho"])
            return [cell(50.0), cell(10.0 * found[-1])]

        searched(chain, run, lambda line: None)
        return found

    few = asked(6)
    assert asked(9)[:6] == few
    assert len(set(few)) == 6


def test_a_search_that_was_stopped_goes_on_with_the_same_trials(searching, tmp_path):
    path = searching()

    def stop_at_the_second(line):
        if "trial 2" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fake.run(path, say=stop_at_the_second)
    before = started(tmp_path / "out")
    whole = fake.run(path)
    again = started(tmp_path / "out")
    assert {job: again[job] for job in before} == before
    assert whole["search"] == fake.run(path, [f"output_dir={tmp_path / 'other'}"])["search"]


def test_the_seed_of_trials_can_be_one_that_is_not_reported(searching):
    chain = read_chain(searching(search=SEARCH | {"seed": 99}))
    assert trial_chain(chain, [OPEN]).recipe.matrix == {"seed": [99]}
    assert chain.recipe.matrix == {"seed": [7]}


def test_a_trial_that_fails_is_passed_over_and_said(searching):
    arm = {"safety_defense": "vaccine", "align.fail": {"one_of": [False, True]}}
    (found,) = fake.run(searching(arms=({"safety_defense": "none"}, arm)))["search"]["arms"]
    assert found["chosen"] == {"align.fail": False}
    failed = [trial for trial in found["trials"] if trial["values"]["align.fail"]]
    assert failed
    assert all(trial["score"] is None and "told to fail" in trial["why"] for trial in failed)
    always = {"safety_defense": "vaccine", "align.fail": {"one_of": [True, 1]}}
    with pytest.raises(UserError, match="all 3 trials of .* failed; the last: .*told to fail"):
        fake.run(searching(arms=({"safety_defense": "none"}, always)))


def rate(percent):
    return {"percent": percent}


def cell(harm, *, benign=90.0, reached=True, curve=(10.0, 30.0)):
    at = {"share": 90, "reached": reached, "harmful_score": rate(harm) if reached else None}
    return {
        "status": "finished", "problems": [], "roles": {"base": "base", "align": "aligned", "attack": "attacked"},
        "models": {"align": {"benign": rate(benign)}, "attack": {"harmful_score": rate(80.0)}},
        "curves": {"attack": [{"harmful_score": rate(percent)} for percent in curve]},
        "matched_utility": {"attack": {"at": [{"share": 80, "reached": True, "harmful_score": rate(1.0)}, at]}},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        (cell(40.0), Trial({}, 30.0, 40.0, 20.0)),
        (cell(40.0, curve=()), Trial({}, 40.0, 40.0, None)),
        (cell(40.0, benign=81.0), Trial({}, 30.0, 40.0, 20.0)),
        (cell(40.0, benign=80.9), Trial({}, 101.0, 40.0, 20.0, "align keeps 80.9 of 90.0 % in benign")),
        (
            cell(0.0, reached=False),
            Trial({}, 101.0, None, 20.0, "the task never reached 90 % of the undefended user's best"),
        ),
    ],
)
def test_harm_counts_where_the_task_is_learnt_and_only_for_a_model_that_keeps_what_it_must(searching, ours, expected):
    search = read_chain(searching(search=SEARCH | {"keep": {"benign": 90.0}})).recipe.search
    assert _read(ours, [cell(70.0)], {}, search) == expected


WRONG = {
    "no search": ({"search": None}, "`align.vaccine.rho` is open, and there is no `search:`"),
    "nothing open": ({"arms": [{"safety_defense": "none"}]}, "no arm has an open setting"),
    "no such stage": (
        {"search": SEARCH | {"judge": "valdate"}},
        "`valdate` is not a stage that evaluates. Did you mean",
    ),
    "a stage that trains": ({"search": SEARCH | {"judge": "align"}}, "`align` is not a stage that evaluates"),
    "one trial": ({"search": SEARCH | {"trials": 1}}, "greater than or equal to 2"),
    "empty range": ({"arms": [OPEN | {"align.vaccine.rho": {"low": 3, "high": 3}}]}, "`low: 3` is not below `high: 3`"),
    "logarithm of zero": ({"arms": [OPEN | {"align.vaccine.rho": RHO | {"low": 0.0}}]}, "has no logarithm"),
    "misspelt": ({"arms": [OPEN | {"align.vaccine.rho": RHO | {"lgo": True}}]}, "unknown key `lgo`"),
    "one choice": ({"arms": [OPEN | {"align.vaccine.rho": {"one_of": [3.0]}}]}, "at least 2 items"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_search_that_cannot_work_is_refused(searching, name):
    changes, message = WRONG[name]
    with pytest.raises(UserError) as refusal:
        read_chain(searching(**changes))
    assert message in str(refusal.value)


PROBLEMS = {
    "the reported questions": ({"validate": JUDGE}, "asks the harmful questions of `judge`, so settings would be"),
    "no attacked model": ({"stage": VALIDATE | {"models": ["align"]}}, "evaluates no attacked model"),
    "not measured": ({"search": SEARCH | {"keep": {"benign": 90.0}}}, "`benign` is not in `accuracy:` of `validate`"),
    "rows that are trained on": (
        {"validate": {"harmful_score": {"judge": "procedure", "prompts": {"path": "h"}}, "output_dir": "unused"}},
        "`validate` asks the rows of h, which `attack` reads",
    ),
    "more layers than there are": (
        {"arms": [{"safety_defense": "none"}, LAYERS], "align": {"harmful_datasets": [{"path": "some/rows"}]}},
        "is more than the model's 4 layers",
    ),
    "no harm measured": ({"validate": {"output_dir": "unused"}}, "`validate` does not measure `harmful_score`"),
    "nobody who attacks": ({"matrix": {"seed": [7], "harmful_ratio": [0.0, 0.2]}}, "with 0 nobody attacks"),
    "nothing undefended": ({"arms": [OPEN]}, "no arm is undefended, and trials are compared with one"),
    "a value that no defense takes": (
        {"arms": [{"safety_defense": "none"}, OPEN | {"align.vaccine.rho": {"low": 0.0, "high": 3.0}}]}, "align: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_the_preflight_finds_in_a_search(searching, tmp_path, name):
    changes, message = PROBLEMS[name]
    assert chain_problems(read_chain(searching())) == []
    tiny_model().config.save_pretrained(tmp_path / "base")
    found = chain_problems(read_chain(searching(**changes)))
    assert any(message in problem for problem in found), found


def test_values_are_whole_where_the_ends_are_and_kept_to_three_digits():
    assert (Range(low=1, high=8).holds(3), Range(low=1, high=8).holds(3.5)) == (True, False)
    assert Range(low=0.1, high=8).holds(3)
    assert not Range(low=0, high=2).holds(True)
    assert not Choice(one_of=[1, 2]).holds(True)

    class Asked:
        def suggest_float(self, key, low, high, *, log):
            return 1.23456

    assert Range(low=0.1, high=8.0).suggest(Asked(), "x") == 1.23


def test_a_dry_run_shows_the_trials_at_the_ends(searching):
    from click.testing import CliRunner

    from tvac_plugin.cli import tvac

    result = CliRunner().invoke(tvac, ["run", str(searching()), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "rho=0.3-seed=7/recipe.yml" in result.output
    assert Path("out/jobs/align-safety_defense=vaccine-align.vaccine.rho=30.0-seed=7/recipe.yml").is_file()
