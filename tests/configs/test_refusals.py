"""Every combination that is refused says what to use instead, and all are listed at once."""

from __future__ import annotations

import pytest

from tests.support.workspace import PLUGIN
from tvac_plugin.args import defense_problems
from tvac_plugin.configs.refusals import REFUSALS, conflicts

REFUSED = {
    "rl": "dpo",
    "reward_model": True,
    "process_reward_model": True,
    "trainer_cls": "my.Trainer",
    "deepspeed": "zero2.json",
    "fsdp": ["full_shard"],
    "fsdp_config": {"fsdp_version": 2},
    "torch_compile": "auto",
    "context_parallel_size": 2,
    "sequence_parallel_degree": 2,
    "tensor_parallel_size": 2,
    "expert_parallel_size": 2,
    "context_parallel": {"size": 2},
    "adapter": "mixlora",
    "nf4_backend": "torchao",
    "nvfp4_merge_aware": True,
    "balance_labels": True,
    "fa_varlen_kwargs_in_collator": True,
    "diffusion_lm": {"from_causal_lm": True},
    "relora": True,
    "lisa_n_layers": 4,
    "streaming": True,
    "pretraining_dataset": [{"path": "x"}],
    "processor_type": "AutoProcessor",
    "gradient_checkpointing_kwargs": {"use_reentrant": True},
    "gradient_checkpointing": "offload",
    "activation_offloading": True,
    "layer_offloading": True,
    "tiled_mlp": True,
    "fp8": True,
    "qat": {"weight_dtype": "int8"},
    "use_ray": True,
    "learning_rate": 0.0,
    "max_grad_norm": 1e-30,
    "adam_epsilon": 1e10,
    "lora_alpha": 0,
    "lora_dropout": 1.0,
}
ACCEPTED = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "context_parallel_size": 1,
    "context_parallel": {"size": 1},
    "adapter": "lora",
    "nf4_backend": "bitsandbytes",
    "fa_varlen_kwargs_in_collator": False,
    "lora_dropout": 0.0,
    "max_grad_norm": 0.0,
    "torch_compile": False,
    "deepspeed": None,
}


def test_every_row_of_the_table_is_tried():
    assert REFUSED.keys() == {refusal.key for refusal in REFUSALS}


@pytest.mark.parametrize("key", REFUSED)
def test_a_refusal_names_the_key_and_the_way_out(key):
    (problem,) = conflicts({key: REFUSED[key]})
    assert problem.startswith(f"`{key}` ")
    assert any(word in problem for word in ("Remove", "Use ", "Set ", "must have"))


def test_settings_that_work_are_not_refused():
    assert conflicts(ACCEPTED) == []


def test_all_conflicts_are_listed_together():
    recipe = {"safety_defense": "t_vaccine", **REFUSED}
    assert len(defense_problems(recipe)) == len(REFUSED) + 1, "and the missing harmful data"


def test_an_undefended_recipe_may_use_anything():
    assert defense_problems(REFUSED) == []
    assert defense_problems({"safety_defense": "none", **REFUSED}) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rl": "dpo"}, "`rl` trains with preferences.*Remove `rl:`"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "`deepspeed` steps the optimizer.*one GPU or with DDP"),
        (
            {"fsdp_version": 2, "fsdp_config": {"offload_params": False}},
            "`fsdp_config` shards weights.*one GPU or with DDP",
        ),
        ({"torch_compile": True}, "`torch_compile` ignores hooks.*Remove it"),
        ({"t_vaccine": {"rho": -1}}, r"t_vaccine.rho\s+Input should be greater than or equal to 0"),
        ({"safety_defence": "t_vaccine", "safety_defense": None}, "Did you mean `safety_defense:`"),
        ({"tvaccine": {"rho": 1}}, "`tvaccine:` is not a key of this plugin. Did you mean `t_vaccine:`"),
    ],
)
def test_axolotl_refuses_the_recipe_before_anything_is_written(workspace, tmp_path, changes, message):
    from axolotl.cli.config import load_cfg
    from axolotl.utils.dict import DictDefault

    recipe = workspace.recipe(tmp_path / "out", **changes)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_cfg(DictDefault(recipe))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"t_vaccine": {"num_active_layers": 9}},
            "num_active_layers: 9 is more than the model's 4 layers. Set it to 4",
        ),
        ({"harmful_datasets": [{"path": "missing.jsonl", "type": "alpaca"}]}, "missing.jsonl does not exist. Correct"),
        ({"harmful_datasets": [{"path": "empty.jsonl", "type": "alpaca"}]}, "empty.jsonl, there is no row in it"),
        ({"harmful_datasets": [{"type": "alpaca"}]}, r"harmful_datasets\[0\]: `path:` is missing"),
        ({"harmful_datasets": [{"path": "empty.jsonl", "typ": "alpaca"}]}, "unknown key `typ`. Did you mean `type`"),
        (
            {"plugins": ["axolotl.integrations.kd.KDPlugin", PLUGIN], "kd_trainer": True},
            "KDPlugin brings its own trainer, and there can be only one. Remove it from `plugins:`",
        ),
        (
            {"plugins": [PLUGIN, "axolotl.integrations.diffusion.DiffusionPlugin"], "diffusion": {}},
            "DiffusionPlugin brings its own trainer|`diffusion_lm` trains a model that fills in masked tokens",
        ),
    ],
)
def test_a_recipe_that_cannot_train_is_refused_before_the_model_loads(
    workspace, tmp_path, monkeypatch, changes, message
):
    from axolotl.cli.config import load_cfg
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.dict import DictDefault

    (tmp_path / "empty.jsonl").write_text("\n")
    monkeypatch.chdir(tmp_path)
    recipe = DictDefault(workspace.recipe(tmp_path / "out", **changes))
    with pytest.raises(ValueError, match=message):
        PluginManager.get_instance().load_datasets(load_cfg(recipe), preprocess=False)
    assert not list((tmp_path / "out").glob("*safe*"))
