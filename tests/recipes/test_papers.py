"""The recipes in `papers/` have the numbers of their authors' scripts, and lead from one to the next.

The numbers were read in `script/`, `train.py` and `trainer.py` of git-disl/Vaccine, git-disl/Booster and git-disl/Lisa.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tvac_plugin.args import defense_config, simulated_user_config
from tvac_plugin.chain.jobs import ChainPlan
from tvac_plugin.chain.recipe import read_chain
from tvac_plugin.evaluation.protocols import PROTOCOLS
from tvac_plugin.recipes.reading import read_recipe

FOLDER = Path(__file__).parent.parent.parent / "recipes"
PAPERS = ("vaccine", "booster", "lisa")
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
COLUMNS = ("num_epochs", "micro_batch_size", "learning_rate", "weight_decay", "lr_scheduler", "sequence_len",
           "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")  # fmt: skip
TRAINING = {
    "vaccine_align": (50, 5, 1e-3, 0.1, "cosine", 200, 8, 4, 0.1, ALL_LINEAR),
    "vaccine_attack": (20, 5, 1e-5, 0.1, "cosine", 200, 8, 1, 0.1, ALL_LINEAR),
    "booster_align": (20, 10, 5e-4, 0.1, "constant", 256, 32, 4, 0, ["q_proj", "k_proj", "v_proj"]),
    "booster_attack": (20, 10, 1e-5, 0.1, "constant", 256, 32, 4, 0, ["q_proj", "k_proj", "v_proj"]),
    "lisa_align": (30, 5, 1e-3, 0.1, "cosine", 2048, 16, 4, 0.1, ALL_LINEAR),
    "lisa_attack": (20, 5, 1e-5, 0, "constant", 2048, 8, 4, 0.1, ["q_proj", "v_proj"]),
}
DEFENSES = {
    "vaccine_align": {"rho": 2.0},
    "booster_align": {"regularizer_scale": 5.0, "harmful_step_size": 0.1, "batch_size": 10},
    "lisa_attack": {"alignment_steps": 100, "user_steps": 900, "rho": 1.0, "batch_size": 5},
}


def recipe_of(name):
    return read_recipe(FOLDER / "papers" / f"{name}.yml")


@pytest.mark.parametrize("name", TRAINING)
def test_a_training_has_the_numbers_of_the_authors_scripts(name):
    recipe = recipe_of(name)
    assert tuple(recipe[key] for key in COLUMNS) == TRAINING[name]
    assert recipe["gradient_accumulation_steps"] == 1


@pytest.mark.parametrize("name", DEFENSES)
def test_a_defense_has_the_numbers_of_the_authors_scripts(name):
    recipe = recipe_of(name)
    assert recipe["safety_defense"] == name.split("_")[0]
    assert DEFENSES[name].items() <= defense_config(recipe).model_dump().items()


@pytest.mark.parametrize(
    ("paper", "rows", "harmful"), [("vaccine", 1000, 100), ("booster", 1000, 100), ("lisa", 5000, 500)]
)
def test_a_user_has_the_rows_of_the_authors_scripts_and_none_of_alignment_s(paper, rows, harmful):
    recipe = recipe_of(f"{paper}_attack")
    user = simulated_user_config(recipe)
    assert (user.num_samples, user.num_harmful) == (rows, harmful)
    assert recipe["simulated_user"]["disjoint_from"] == recipe_of(f"{paper}_align")["datasets"]


@pytest.mark.parametrize("paper", PAPERS)
def test_a_recipe_by_hand_starts_where_the_one_before_it_ends(paper):
    align, attack, evaluation = (recipe_of(f"{paper}_{stage}") for stage in ("align", "attack", "evaluate"))
    assert attack["base_model"] == f"{align['output_dir']}/merged"
    assert evaluation["models"] == {"aligned": align["output_dir"], "attacked": attack["output_dir"]}
    assert evaluation["protocol"] == paper
    assert paper in PROTOCOLS


@pytest.mark.parametrize("paper", PAPERS)
def test_a_chain_has_the_paper_s_defense_and_its_plain_baseline(paper, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = ChainPlan(read_chain(FOLDER / "papers" / f"{paper}_chain.yml"))
    assert [set(cell.values()) for cell, _ in plan.cells] == [{"none"}, {paper}]
    defended = [
        job.stage for job in plan.jobs.values() if job.kind == "train" and job.recipe["safety_defense"] == paper
    ]
    assert defended == ["attack" if paper == "lisa" else "align"]


@pytest.mark.parametrize("path", sorted((FOLDER / "papers").glob("*.yml")), ids=lambda path: path.stem)
def test_a_header_says_whose_protocol_it_is_and_where_it_differs(path):
    header = path.read_text().split("\n\n")[0]
    assert f"github.com/git-disl/{path.stem.split('_')[0].title()}" in header
    assert "# Differs:" in header
