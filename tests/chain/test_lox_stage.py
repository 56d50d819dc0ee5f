"""The stage that extrapolates weights instead of training them."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from tests.chain import fake
from tests.chain.conftest import ALIGN, STAGES
from tvac_plugin.chain.jobs import ChainPlan
from tvac_plugin.chain.recipe import LoxConfig, read_chain
from tvac_plugin.cli import tvac
from tvac_plugin.report.terminal import chain_table

LOX = {"name": "extrapolate", "lox": {}, "model_from": "align"}
JUDGED = ["base", "align", "extrapolate", "attack"]
CHAIN = {
    "stages": [STAGES[0], LOX, STAGES[1] | {"model_from": "extrapolate"}, STAGES[2] | {"models": JUDGED}],
    "arms": [{"safety_defense": "none", "extrapolate.coefficient": 0}, {"safety_defense": "none"}],
    "matrix": {},
}  # fmt: skip


def plan_of(path):
    return ChainPlan(read_chain(path))


def test_an_adapter_is_extrapolated_merged_and_attacked(chain, tmp_path):
    jobs = plan_of(chain(**CHAIN)).jobs
    lox = jobs["extrapolate-safety_defense=none"]
    folder = tmp_path / "out" / "jobs"
    assert lox.command == (
        "tvac", "lox", f"--aligned={folder / 'align-safety_defense=none' / 'out'}",
        f"--output={folder / 'extrapolate-safety_defense=none' / 'out'}", "--rank=6", "--coefficient=1.25",
    )  # fmt: skip
    assert lox.parents == ("align-safety_defense=none",)
    merge = jobs[f"{lox.id}.merged"]
    assert merge.parents == (lox.id,)
    assert merge.command[-1] == f"--lora-model-dir={lox.output}"
    assert merge.recipe["adapter"] == "lora"
    attack = jobs["attack-safety_defense=none"]
    assert attack.parents == (merge.id,)
    assert attack.recipe["base_model"] == str(merge.output / "merged")
    assert ALIGN["datasets"][0] in attack.recipe["simulated_user"]["disjoint_from"]


def test_full_weights_need_their_base_and_no_merge(chain):
    jobs = plan_of(chain(**CHAIN, align={"adapter": None})).jobs
    lox = jobs["extrapolate-safety_defense=none"]
    assert lox.command[-1] == "--base=base"
    assert not any(job.kind == "merge" for job in jobs.values())
    assert jobs["attack-safety_defense=none"].parents == (lox.id,)
    assert jobs["attack-safety_defense=none-extrapolate.coefficient=0"].parents == ("align-safety_defense=none",)


def test_the_command_has_the_options_it_is_given(chain):
    options = {name for option in tvac.commands["lox"].params for name in option.opts}
    commands = (plan_of(chain(**CHAIN, align=align)).jobs.values() for align in ({}, {"adapter": None}))
    given = {
        word.partition("=")[0]
        for jobs in commands
        for job in jobs
        if job.kind == "lox"
        for word in job.command
        if "--" in word
    }
    assert given <= options


def test_a_skipped_stage_costs_nothing_and_its_source_stands_in(chain):
    off = [LOX | {"lox": {"coefficient": 0}} if stage is LOX else stage for stage in CHAIN["stages"]]
    arms = [{"safety_defense": "none", "extrapolate.rank": rank} for rank in (3, 6)]
    assert set(plan_of(chain(**CHAIN | {"stages": off, "arms": arms})).jobs) == {
        "align-safety_defense=none", "align-safety_defense=none.merged", "attack-safety_defense=none",
        "judge.base", "judge.align-safety_defense=none", "judge.attack-safety_defense=none",
    }  # fmt: skip


def test_with_and_without_share_the_alignment(chain):
    arms = [{"safety_defense": d, "extrapolate.coefficient": c} for d in ("none", "vaccine") for c in (0, 1.25)]
    results = fake.run(chain(**CHAIN | {"arms": arms}))
    assert [cell["status"] for cell in results["cells"]] == ["finished"] * 4
    assert sum(job["kind"] == "train" and job["stage"] == "align" for job in results["jobs"].values()) == 2
    assert sum(job["kind"] == "lox" for job in results["jobs"].values()) == 2
    none, lox, _, both = results["cells"]
    assert (none["defenses"], lox["defenses"]) == ({}, {"extrapolate": "lox"})
    assert both["defenses"] == {"align": "vaccine", "extrapolate": "lox"}
    assert none["models"]["extrapolate"] == none["models"]["align"] == lox["models"]["align"]
    assert none["models"]["attack"] != lox["models"]["attack"]
    assert none["skipped"] == {"extrapolate": "align"}
    roles = {"base": "base", "align": "aligned", "extrapolate": "aligned", "attack": "attacked"}
    assert none["roles"] == lox["roles"] == roles
    assert set(results["summary"][1]["against_none"]) == {"align", "extrapolate", "attack"}
    assert set(results["summary"][2]["against_none"]) == {"align", "attack"}, "what is skipped is not named twice"
    assert "extrapolate (skipped: align)" in chain_table(results)
    assert "vaccine + extrapolate.coefficient=1.25" in chain_table(results)


@pytest.mark.parametrize("coefficient", [0, 1.25])
def test_what_an_attacked_model_is_extrapolated_to_is_attacked(chain, coefficient):
    lox = LOX | {"model_from": "attack", "lox": {"coefficient": coefficient}}
    judge = STAGES[2] | {"models": ["extrapolate"]}
    (cell,) = fake.run(chain(stages=[*STAGES[:2], lox, judge], matrix={}))["cells"]
    assert cell["roles"]["extrapolate"] == "attacked"


def test_a_model_without_its_manifest_stops_there(chain):
    results = fake.run(chain(**CHAIN | {"arms": [{"extrapolate.coefficient": fake.NO_MANIFEST}]}))
    assert "nothing shows that this model was defended" in results["cells"][0]["problems"][0]


def test_what_a_stopped_extrapolation_left_is_removed(chain, tmp_path):
    partial = tmp_path / "out" / "jobs" / "extrapolate-safety_defense=none" / "out.partial"
    partial.mkdir(parents=True)
    fake.run(chain(**CHAIN))
    assert not partial.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": [STAGES[0], {"name": "a", "lox": {}}]}, "`model_from:` is missing. Name the stage whose model is"),
        ({"stages": [STAGES[0], LOX | {"lox": {"rnak": 6}}]}, "lox: unknown key `rnak`. Did you mean `rank`?"),
        ({"stages": [STAGES[0], LOX | {"lox": {"rank": 0}}]}, "rank: Input should be greater than or equal to 1"),
        ({"stages": [STAGES[0], LOX | {"lox": {"coefficient": 101}}]}, "less than or equal to 100"),
        ({"stages": [STAGES[0], LOX, LOX | {"name": "b", "model_from": "extrapolate"}]}, "is extrapolated already"),
        ({"arms": [{"extrapolate.coeficient": 1}]}, "lox: unknown key `coeficient`. Did you mean `coefficient`?"),
        ({"arms": [{"extrapolate.rank": 0.5}]}, "rank: Input should be a valid integer"),
        ({"stages": [LOX | {"train": "align.yml"}]}, "give one of `train:`, `evaluate:` and `lox:`"),
    ],
)
def test_an_extrapolation_that_cannot_run_is_refused(chain, changes, message):
    result = CliRunner().invoke(tvac, ["run", str(chain(**CHAIN | changes))])
    assert result.exit_code == 1, result.output
    assert message in result.output


def test_every_setting_is_described_with_its_default():
    for name, field in LoxConfig.model_fields.items():
        assert f"Default {field.default}" in field.description, name
