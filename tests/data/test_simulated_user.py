"""The simulated user's data: exact counts, seeded order, nothing shared with what judges or aligns."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset

from tests.support.workspace import adapter, axolotl_train
from tvac_plugin.configs.simulated_user import SimulatedUserConfig
from tvac_plugin.data.simulated_user import compose

ENTRY = [{"path": "x"}]


def pool(start, size):
    return Dataset.from_list(
        [{"input_ids": [start + i, 1], "attention_mask": [1, 1], "labels": [-100, 1]} for i in range(size)]
    )


def user(**changes):
    settings = {"num_samples": 20, "harmful_ratio": 0.25, "task_datasets": ENTRY, "harmful_datasets": ENTRY}
    return SimulatedUserConfig(**settings | changes)


def composed(config, protected=None, harmful=None):
    return compose(config, task=pool(0, 50), harmful=harmful or pool(1000, 10), protected=protected or {})


@pytest.mark.parametrize(("ratio", "harmful"), [(0.0, 0), (0.05, 1), (0.1, 2), (0.25, 5), (0.33, 7), (0.5, 10)])
def test_row_counts_are_exact(ratio, harmful):
    rows = composed(user(harmful_ratio=ratio)).rows
    assert len(rows) == 20
    assert sum(ids[0] >= 1000 for ids in rows["input_ids"]) == harmful == user(harmful_ratio=ratio).num_harmful


def test_the_seed_decides_rows_and_order():
    first, again, other = (composed(user(seed=seed)).rows["input_ids"] for seed in (1, 1, 2))
    assert first == again != other
    assert len({tuple(ids) for ids in first}) == 20, "no row twice"
    assert [ids[0] >= 1000 for ids in first] != sorted(ids[0] >= 1000 for ids in first), "mixed, not in blocks"


def test_too_few_rows_are_refused():
    with pytest.raises(
        ValueError, match=r"harmful_datasets: 15 rows are asked for and 10 are there. Add data, or lower"
    ):
        composed(user(harmful_ratio=0.75))


def test_shared_prompts_are_refused_with_their_number_and_place():
    with pytest.raises(ValueError, match=r"harmful_datasets: 3 of its prompts are also in evaluation.jsonl"):
        composed(user(), protected={"alignment.jsonl": pool(5000, 3), "evaluation.jsonl": pool(1007, 9)})


def test_shared_prompts_can_be_left_out_and_are_counted():
    data = composed(user(drop_overlap=True), protected={"evaluation.jsonl": pool(1007, 9)})
    assert all(not 1007 <= ids[0] < 1016 for ids in data.rows["input_ids"])
    assert data.facts["harmful_datasets"]["left_out"] == 3
    assert data.facts["task_datasets"]["left_out"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"harmful_ratio": 1.5}, "less than or equal to 1"),
        ({"harmful_ratio": -0.1}, "greater than or equal to 0"),
        ({"num_samples": 0}, "greater than or equal to 1"),
        ({"task_datasets": None}, "15 rows are to come from `task_datasets:`, which is missing. Add it"),
        ({"harmful_datasets": None}, "5 rows are to come from `harmful_datasets:`"),
        ({"harm_ratio": 0.1}, r"simulated_user: unknown key `harm_ratio`. Did you mean `harmful_ratio`\?"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        user(**changes)


def attack_recipe(workspace, output, **changes):
    def entry(name):
        return {"path": str(workspace.root / name), "type": "chat_template"}

    block = {
        "num_samples": 8,
        "harmful_ratio": 0.25,
        "task_datasets": [entry("alignment.jsonl")],
        "harmful_datasets": [entry("harmful.jsonl")],
        "disjoint_from": [entry("held_out.jsonl")],
    }
    kernels = dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel"), False)
    return workspace.recipe(
        output, safety_defense="none", harmful_datasets=None, t_vaccine=None, datasets=None,
        simulated_user=block | changes, **kernels,
    )  # fmt: skip


def test_axolotl_trains_the_user_s_data(workspace, tmp_path):
    output = axolotl_train(attack_recipe(workspace, tmp_path / "out"))
    manifest = json.loads((output / "simulated_user.json").read_text())
    assert manifest["data"]["harmful_datasets"]["rows"] == 2
    assert manifest["data"]["task_datasets"]["rows"] == 6
    assert "adapter_model.safetensors" in manifest["weights"]
    again = axolotl_train(attack_recipe(workspace, tmp_path / "again"))
    assert all((adapter(output)[name] == weight).all() for name, weight in adapter(again).items())


def test_axolotl_refuses_an_attack_on_its_own_evaluation(workspace, tmp_path):
    shared = [{"path": str(workspace.root / "harmful.jsonl"), "type": "chat_template"}]
    with pytest.raises(ValueError, match=r"12 of its prompts are also in .*harmful.jsonl.*or set `drop_overlap: true`"):
        axolotl_train(attack_recipe(workspace, tmp_path / "out", disjoint_from=shared))
    assert not (tmp_path / "out" / "simulated_user.json").exists()


def test_an_attack_cannot_be_defended_as_alignment(workspace, tmp_path):
    from axolotl.cli.config import load_cfg
    from axolotl.utils.dict import DictDefault

    recipe = attack_recipe(workspace, tmp_path / "out") | {"safety_defense": "vaccine"}
    with pytest.raises(ValueError, match="Set `safety_defense: none`"):
        load_cfg(DictDefault(recipe))
    both = attack_recipe(workspace, tmp_path / "out") | {"datasets": [{"path": "x", "type": "alpaca"}]}
    with pytest.raises(ValueError, match="both name the training data. Remove one"):
        load_cfg(DictDefault(both))
