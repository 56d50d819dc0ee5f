"""The chain: what is shared, what is skipped, what survives a kill, and what is refused."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from tests.chain import fake
from tests.chain.conftest import ALIGN, ATTACK, JUDGE, STAGES, started, timeless
from tvac_plugin.boundary.errors import UserError
from tvac_plugin.chain.jobs import ChainPlan
from tvac_plugin.chain.preflight import chain_problems
from tvac_plugin.chain.recipe import read_chain
from tvac_plugin.cli import tvac
from tvac_plugin.recipes import reading
from tvac_plugin.report.terminal import chain_table


def test_cells_share_what_they_have_in_common(chain):
    path = chain(matrix={"safety_defense": ["none", "vaccine"], "harmful_ratio": [0.0, 0.1], "seed": [1, 2]})
    plan = fake.fake_plan(path)
    kinds = [job.kind for job in plan.jobs.values()]
    assert len(plan.cells) == 8
    # 2 defenses x 2 seeds are aligned and merged once for both ratios; the base is judged once for all
    assert (kinds.count("train"), kinds.count("merge"), kinds.count("evaluate")) == (4 + 8, 4, 1 + 4 + 8)


def test_resolved_recipes_hold_the_matrix_and_the_stage_before(chain):
    plan = fake.fake_plan(chain(matrix={"safety_defense": ["vaccine"], "harmful_ratio": [0.2], "seed": [7]}))
    attack = next(job for job in plan.jobs.values() if job.stage == "attack")
    assert attack.recipe["simulated_user"]["harmful_ratio"] == 0.2
    assert attack.recipe["seed"] == attack.recipe["simulated_user"]["seed"] == 7
    assert attack.recipe["safety_defense"] == "none"
    assert attack.recipe["base_model"].endswith("align-safety_defense=vaccine-seed=7.merged/out/merged")
    assert ALIGN["datasets"][0] in attack.recipe["simulated_user"]["disjoint_from"]


def test_retention_is_held_against_what_the_alignment_starts_from(chain):
    retention = {"prompts": {"path": "benign.jsonl"}}
    matrix = {"align.base_model": ["base", "other"]}
    plan = fake.fake_plan(chain(judge={"retention": retention}, matrix=matrix))
    judged = [job for job in plan.jobs.values() if job.kind == "evaluate"]
    assert len(judged) == 6
    for job in judged:
        assert job.recipe["retention"] == retention | {"of": "other" if "=other" in job.id else "base"}
    plan = fake.fake_plan(chain(judge={"retention": retention | {"of": "mine"}}, matrix=matrix))
    assert {job.recipe["retention"]["of"] for job in plan.jobs.values() if job.kind == "evaluate"} == {"mine"}


def test_attacked_models_are_asked_as_the_attack_was_trained_and_aligned_ones_plainly(chain):
    key = "attack.simulated_user.prompt_transform"
    plan = fake.fake_plan(chain(matrix={"safety_defense": ["none"], key: [None, "backdoor"]}))
    asked = {job.id: job.recipe["harmful_score"].get("prompt_transform") for job in plan.jobs.values()
             if job.kind == "evaluate"}  # fmt: skip
    assert sorted(map(str, asked.values())) == ["None", "None", "None", "backdoor"]
    (rewritten,) = (name for name, transform in asked.items() if transform)
    assert rewritten.startswith("judge.attack")
    assert "prompt_transform=backdoor" in rewritten


@pytest.mark.parametrize(("asked", "problems"), [("backdoor", 0), ({"prompt": "{prompt}"}, 0), (None, 0), ("style", 1)])
def test_an_attack_is_not_judged_by_another_way_of_asking(chain, tmp_path, asked, problems):
    (tmp_path / "base").mkdir()
    attack = {"simulated_user": ATTACK["simulated_user"] | {"prompt_transform": "backdoor"}}
    judge = {"harmful_score": JUDGE["harmful_score"] | {"prompt_transform": asked}}
    found = chain_problems(read_chain(chain(attack=attack, judge=judge, matrix={"safety_defense": ["none"]})))
    assert sum("and attack was trained on" in problem for problem in found) == problems


def test_a_retention_that_is_no_block_is_said_before_anything_starts(chain):
    result = CliRunner().invoke(tvac, ["run", str(chain(judge={"retention": "benign.jsonl"})), "--dry-run"])
    assert result.exit_code == 1
    assert "judge: retention" in result.output


def test_evaluations_can_be_varied_too(chain):
    plan = fake.fake_plan(chain(matrix={"judge.batch_size": [1, 2], "align.base_model": ["base", "other"]}))
    judged = [job.recipe for job in plan.jobs.values() if job.subject == "base"]
    assert sorted((recipe["batch_size"], recipe["models"]["base"]) for recipe in judged) == [
        (1, "base"), (1, "other"), (2, "base"), (2, "other"),
    ]  # fmt: skip


def test_all_data_of_the_alignment_is_kept_from_the_user(chain, tmp_path):
    keys = ("harmful_datasets", "refusal_datasets", "retain_datasets", "alignment_datasets")
    asked = {key: [{"path": f"some/{key}", "type": "alpaca"}] for key in keys}
    plan = fake.fake_plan(chain(align=asked, matrix={}))
    protected = plan.jobs["attack"].recipe["simulated_user"]["disjoint_from"]
    assert protected == [*ALIGN["datasets"], *(entry for key in keys for entry in asked[key])]


def test_no_job_reads_what_another_prepared_or_an_earlier_run_left(chain, tmp_path):
    path = chain()
    fake.run(path)
    folders = {job.recipe["dataset_prepared_path"] for job in fake.fake_plan(path).jobs.values() if job.kind == "train"}
    assert len(folders) == 4
    (tmp_path / "alignment.jsonl").write_text("b")
    for folder in map(Path, folders):
        folder.mkdir()
    fake.run(path)
    assert not any(Path(folder).exists() for folder in folders)


def test_every_defense_meets_the_same_attack(chain):
    attacks = [job.recipe for job in fake.fake_plan(chain()).jobs.values() if job.stage == "attack"]
    same = [
        {k: v for k, v in recipe.items() if k != "base_model" and not k.endswith(("_dir", "_path"))}
        for recipe in attacks
    ]
    assert len(same) == 2
    assert same[0] == same[1]


def test_results_have_cells_curves_costs_and_comparisons(chain):
    results = fake.run(chain(attack_threshold=0.0))
    assert [cell["status"] for cell in results["cells"]] == ["finished", "finished"]
    assert results["cells"][0]["models"].keys() == {"base", "align", "attack"}
    assert [point["step"] for point in results["cells"][0]["curves"]["attack"]] == [10, 20]
    assert results["cells"][0]["attack_cost"] == {"attack": 10}
    assert results["cells"][0]["roles"] == {"base": "base", "align": "aligned", "attack": "attacked"}
    assert results["summary"][1]["against_none"]["attack"]["harmful_score"].keys() == {
        "points", "low", "high", "within_noise",
    }  # fmt: skip


def test_an_alignment_that_ended_too_early_is_called_unfinished_and_an_attack_is_not(chain):
    results = fake.run(chain(align={"still_falling": True}, attack={"still_falling": True}))
    settled = {job["stage"]: job.get("settled") for job in results["jobs"].values() if job["kind"] == "train"}
    assert settled == {"align": False, "attack": None}
    table = chain_table(results)
    said = [line for line in table.splitlines() if "UNFINISHED" in line]
    aligned = [name for name, job in results["jobs"].items() if job["kind"] == "train" and job["stage"] == "align"]
    assert [line.removeprefix("Read with care. ").partition(": ")[0] for line in said] == aligned
    assert "the losses had not settled: loss went from 2.16 to 2.06" in " ".join(table.split())


def test_the_report_says_in_how_many_batches_an_alignment_was_defended(chain):
    said = chain_table(fake.run(chain())).splitlines()
    assert [line.partition(": ")[2] for line in said if "batches defended" in line] == [
        "7 of 7 batches defended (all), in 7 of 7 steps."
    ]


def test_two_attacks_have_a_curve_and_a_cost_each(chain):
    again = STAGES[1] | {"name": "again", "model_from": "attack"}
    judge = STAGES[2] | {"models": ["attack", "again", "base"]}
    results = fake.run(chain(stages=[*STAGES[:2], again, judge], matrix={}, attack_threshold=0.0))
    (cell,) = results["cells"]
    assert {name: [point["step"] for point in curve] for name, curve in cell["curves"].items()} == {
        "attack": [10, 20], "again": [10, 20],
    }  # fmt: skip
    assert cell["curves"]["attack"] != cell["curves"]["again"]
    assert cell["attack_cost"] == {"attack": 10, "again": 10}
    assert results["summary"][0]["attack_cost"] == {"attack": [10], "again": [10]}
    assert cell["roles"] == {"base": "base", "align": "aligned", "attack": "attacked", "again": "attacked"}
    assert "all, again: harmful score above 0 %: after 10 steps." in chain_table(results)


def test_code_of_others_is_announced_before_it_is_imported(chain):
    path = chain(matrix={"safety_defense": ["none", "gone.Defense"]})
    result = CliRunner().invoke(tvac, ["run", str(path), "--dry-run"])
    announced = "align: safety_defense: gone.Defense is imported, which runs its code."
    assert result.stderr.index(announced) < result.stderr.index("cannot be imported")


def test_a_second_run_does_nothing_and_gives_the_same(chain, tmp_path):
    path = chain()
    first, before = fake.run(path), started(tmp_path / "out")
    assert timeless(fake.run(path)) == timeless(first)
    assert started(tmp_path / "out") == before


def test_only_what_changed_and_what_depends_on_it_runs_again(chain, tmp_path):
    fake.run(chain())
    before = started(tmp_path / "out")
    fake.run(chain(attack={"learning_rate": 1}))
    again = {name for name, time in started(tmp_path / "out").items() if before[name] != time}
    assert again == {
        f"{stage}-safety_defense={defense}" for stage in ("attack", "judge.attack") for defense in ("none", "vaccine")
    }


def test_a_failed_cell_is_shown_and_the_others_go_on(chain, tmp_path):
    path = chain(matrix={"align.fail": [False, True]})
    results = fake.run(path)
    assert [cell["status"] for cell in results["cells"]] == ["finished", "failed"]
    assert "told to fail" in results["cells"][1]["problems"][0]
    assert "did not finish" in results["cells"][1]["problems"][1]
    assert results["cells"][1]["models"] == {}


def test_a_defense_without_its_manifest_stops_there(chain):
    results = fake.run(chain(align={"forget_manifest": True}))
    undefended, claimed = results["cells"]
    assert undefended["status"] == "finished"
    assert "nothing shows that this model was defended" in claimed["problems"][0]
    assert claimed["models"] == {}


def test_a_full_disk_ends_the_chain_with_one_sentence(chain, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "results.json")

    monkeypatch.setattr("tvac_plugin.chain.runner.run_plan", full)
    result = CliRunner().invoke(tvac, ["run", str(chain())])
    assert result.exit_code == 1
    assert "No space left on device: 'results.json'. Fix that and run the same command again." in result.output
    assert not (tmp_path / "out" / "results.json").exists()


def test_two_runs_of_one_chain_are_refused(chain, tmp_path):
    from filelock import FileLock

    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(UserError, match="already running. Wait for it"):
        fake.run(chain())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": [{"name": "a", "train": "gone.yml"}]}, "gone.yml: cannot be read"),
        ({"stages": [STAGES[1], STAGES[0]]}, "`align` is not a stage before it, so it would wait for ever"),
        ({"stages": [STAGES[0], STAGES[0]]}, "the name is taken"),
        ({"stages": [STAGES[0] | {"evaluate": "judge.yml"}]}, "give one of `train:`, `evaluate:` and `lox:`"),
        ({"stages": [STAGES[0] | {"nmae": "x"}]}, "Did you mean `name`"),
        ({"stages": []}, "at least 1 item"),
        ({"matrix": {"safety_defence": ["none"]}}, "`safety_defence` is of no stage. Use safety_defense"),
        ({"matrix": {"seed": []}}, "`seed:` has no values"),
        ({"matrix": {"seed": [1, 2, 1]}}, "`seed:` has a value twice. Give each once."),
        ({"matrix": {"align.x": ["a/b", "a_b"]}}, "two different jobs would have this folder"),
        ({"align": {"retain_datasets": [{"path": "gone.jsonl"}]}}, "align: retain_datasets: gone.jsonl does not"),
        ({"stages": [STAGES[0] | {"model_from": "base"}]}, "`base` is no stage. Remove `model_from:`"),
        ({"stages": [*STAGES, STAGES[1] | {"name": "b", "model_from": "judge"}]}, "`judge` makes no model"),
        ({"matrix": {"safety_defense": ["t-vaccine"]}}, "Did you mean `t_vaccine`"),
        ({"matrix": {"harmful_ratio": [1.5]}}, "less than or equal to 1"),
        ({"judge": {"harmful_score": {"judge": "jury", "prompts": {"path": "x"}}}}, "`jury` is not a judge"),
        ({"align": {"plugins": []}}, "the plugin is not loaded"),
        ({"align": {"deepspeed": "z.json"}}, "`deepspeed` steps the optimizer"),
        ({"align": {"base_model": "./a/b"}}, "base_model: ./a/b does not exist"),
        ({"align": {"datasets": [{"path": "gone.jsonl"}]}}, "align: datasets: gone.jsonl does not exist"),
    ],
)
def test_a_chain_that_cannot_run_is_refused_before_it_starts(chain, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(reading, "loads_installed_plugins", lambda: False)
    result = CliRunner().invoke(tvac, ["run", str(chain(**changes))])
    assert result.exit_code == 1, result.output
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_another_kind_of_recipe_names_its_command(chain):
    result = CliRunner().invoke(tvac, ["run", str(chain().with_name("align.yml"))])
    assert result.exit_code == 1
    assert "this is a training recipe. Use `axolotl train` with it." in result.output


def test_a_dry_run_writes_recipes_and_prints_commands(chain, tmp_path):
    result = CliRunner().invoke(tvac, ["run", str(chain()), "--dry-run", "--set", "align.learning_rate=0.5"])
    assert result.exit_code == 0, result.output
    assert result.output.count("axolotl train") == 4
    job = tmp_path / "out" / "jobs" / "align-safety_defense=none"
    assert yaml.safe_load((job / "recipe.yml").read_text())["learning_rate"] == 0.5
    assert not list(tmp_path.glob("out/jobs/*/out"))


@pytest.mark.parametrize(("num_gpus", "launcher"), [(0, "python"), (1, "python"), (2, "accelerate")])
def test_accelerate_starts_a_training_only_where_it_has_gpus_to_spread_it_over(chain, monkeypatch, num_gpus, launcher):
    monkeypatch.setattr("torch.cuda.device_count", lambda: num_gpus)
    jobs = ChainPlan(read_chain(chain())).jobs.values()
    assert {job.command[-1] for job in jobs if job.kind == "train"} == {f"--launcher={launcher}"}
