"""Whatever the settings, a model that is sealed was trained, is whole, and is not what plain fine-tuning gives."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn
from trl import SFTConfig

from tests.support.models import tiny_model
from tests.support.sft_runs import chats
from tests.support.strategies import fuzz
from tvac_plugin import SafetyDefenseSFTTrainer
from tvac_plugin.boundary.errors import UserError
from tvac_plugin.configs import DEFENSE_CONFIGS
from tvac_plugin.provenance.manifest import MANIFEST_FILE, verify
from tvac_plugin.tiny_world.base_model import build_tokenizer
from tvac_plugin.tiny_world.language import REFUSAL, World

WORLD = World.create(seed=0, num_hazards=16, num_benign=4)
TOKENIZER = build_tokenizer(WORLD)


def tokenized(things: Any, *, refuse: bool) -> Dataset:
    """Rows as `SFTTrainer` makes them, so that it has nothing left to do."""
    rows = []
    for row in chats(things, refuse=refuse):
        prompt = TOKENIZER.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        whole = TOKENIZER.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)
        rows.append({"input_ids": whole, "labels": [-100] * len(prompt) + whole[len(prompt) :]})
    return Dataset.from_list(rows)


DATA = {
    "train_dataset": tokenized(WORLD.hazards[:6], refuse=True),
    "harmful_dataset": tokenized(WORLD.hazards[6:12], refuse=False),
    "refusal_dataset": tokenized(WORLD.hazards[6:12], refuse=True),
    "retain_dataset": tokenized(WORLD.benign, refuse=False),
    "alignment_dataset": tokenized(WORLD.hazards[12:], refuse=True),
}

sensible = st.sampled_from([1e-3, 2e-3, 0.01, 0.1, 1.0, 5.0, 100.0, 1e4])
weak = st.sampled_from([0.0, 1e-38, 1e-12, 1e-6])
wrong = st.sampled_from([-1.0, 1e30, float("nan"), float("inf")])
scales = st.one_of(sensible, sensible, sensible, sensible, sensible, weak, weak, wrong)
counts = st.sampled_from([0, 1, 1, 1, 2, 2, 3, 50, 10**6])
shares = st.sampled_from([0.0, 1e-30, 0.2, 0.2, 0.5, 0.5, 0.9, 0.9, 1.0, 2.0])
sites, scopes = st.sampled_from(["attention", "mlp", "layer"]), st.sampled_from(["batch", "sample"])
rho_scales = st.sampled_from(["absolute", "relative"])
few = st.sampled_from([1, 2, 3])
PERTURBATION = {"rho": scales, "perturb": sites, "rho_scope": scopes, "rho_scale": rho_scales}
SETTINGS = {
    "t_vaccine": PERTURBATION
    | {
        "num_active_layers": st.sampled_from([1, 1, 2, 2, 3]),
        "layer_sampling": st.sampled_from(["gradient_norm", "relative_gradient_norm", "top_k", "uniform"]),
        "resample_steps": few,
        "probe_steps": few,
        "freeze": st.sampled_from(["layer", "attention", "none"]),
        "perturbed_share": shares,
        "checkpoint_inactive": st.sampled_from(["auto", "on", "off"]),
    },
    "vaccine": PERTURBATION | {"perturbed_share": shares},
    "oasis": PERTURBATION
    | {
        "num_active_layers": st.sampled_from([1, 1, 2, 2, 3]),
        "probe_steps": few,
        "probe_batch_size": few,
        "renormalise": st.booleans(),
    },
    "random_noise": PERTURBATION,
    "rep_noise": {"alpha": scales, "beta": scales, "refusal_scale": scales, "batch_size": few},
    "tar": {
        "tamper_loss": st.sampled_from(["dpo", "entropy"]),
        "tamper_scale": scales,
        "inner_steps": few,
        "tamper_every": few,
        "schedule_decay": scales,
        "adversary_learning_rates": st.lists(st.sampled_from([1e-30, 1e-4, 0.1, 10.0, 1e6]), min_size=1, max_size=2),
        "held_out": shares,
        "batch_size": few,
        "retain_scale": scales,
        "representation_scale": scales,
        "dpo_beta": scales,
    },
    "booster": {"regularizer_scale": scales, "harmful_step_size": scales, "batch_size": few},
    "ctrap": {
        "collapse_scale": scales,
        "harmful_step_size": scales,
        "collapse_token": st.sampled_from([None, 0, 5, REFUSAL.split()[0], REFUSAL, 10**6]),
    },
    "circuit_breaker": {
        "alpha": scales,
        "retain_scale": scales,
        "layers": st.sampled_from([None, None, [1], [2], [1, 2], [3]]),
        "batch_size": few,
    },
    "crl": {
        "harmful_scale": scales,
        "benign_scale": scales,
        "kl_scale": scales,
        "harmful_margin": shares,
        "benign_margin": shares,
        "kl_temperature": scales,
        "batch_size": few,
    },
    "seam": {
        "unlearning_scale": scales,
        "refusal_scale": scales,
        "self_destruct_scale": scales,
        "probe_step_size": scales,
        "batch_size": few,
    },
    "lisa": {"alignment_steps": counts, "user_steps": counts, "rho": scales, "warmup_ratio": shares, "batch_size": few},
}
NEEDED = {
    "t_vaccine": {"num_active_layers"},
    "oasis": {"num_active_layers"},
    "tar": {"inner_steps", "tamper_every"},
    "lisa": {"alignment_steps"},
}
PARTS = {"all": "", "embeddings": "embed_tokens", "first layer": "layers.0.", "last layer": "layers.1.",
         "norms": "norm", "head": "lm_head", "attention": "self_attn"}  # fmt: skip
MODULES = ["q_proj", "v_proj", "o_proj", "down_proj", "up_proj", "lm_head", "embed_tokens"]


class Run(NamedTuple):
    """One training in all that is drawn."""

    defense: str
    settings: dict[str, Any]
    lora: list[str] | None
    only_layer: int | None
    part: str
    dtype: torch.dtype
    training: dict[str, Any]


def blocks(name: str) -> st.SearchStrategy[dict[str, Any]]:
    """Settings of a defense: one or two of them are anything, the others are the defaults or small."""
    needed = NEEDED.get(name, set())
    fields = SETTINGS[name]
    return st.fixed_dictionaries(
        {key: fields[key] for key in needed}, optional={key: fields[key] for key in fields.keys() - needed}
    )


@st.composite
def runs(draw: st.DrawFn) -> Run:
    name = draw(st.sampled_from(sorted(DEFENSE_CONFIGS)))
    lora = draw(st.one_of(st.none(), st.lists(st.sampled_from(MODULES), min_size=1, max_size=3, unique=True)))
    return Run(
        defense=name,
        settings=draw(blocks(name)),
        lora=lora,
        only_layer=draw(st.sampled_from([None, None, None, 0, 1])) if {*(lora or ())} & {*MODULES[:5]} else None,
        part=draw(st.sampled_from(["all", "all", *PARTS])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        training={
            "learning_rate": draw(st.sampled_from([0.0, 1e-30, 1e-6, 1e-5, 1e-4, 1e-3, 1e-3, 1e-2, 1e-2, 1.0, 1e6])),
            "max_steps": draw(few),
            "gradient_accumulation_steps": draw(st.sampled_from([1, 1, 2])),
            "optim": draw(st.sampled_from(["adamw_torch", "adamw_torch", "sgd"])),
            "per_device_train_batch_size": draw(st.sampled_from([1, 2])),
        },
    )


def model_of(run: Run) -> nn.Module:
    """The model before training: random, and the adapter as PEFT starts it."""
    model = tiny_model(vocab_size=len(TOKENIZER), num_hidden_layers=2).to(run.dtype)
    if run.lora is None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(PARTS[run.part] in name)
        return model
    torch.manual_seed(0)
    where = {} if run.only_layer is None else {"layers_to_transform": [run.only_layer], "layers_pattern": "layers"}
    return get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=run.lora, **where))


def trained(run: Run, output: Path, *, is_defended: bool) -> dict[str, torch.Tensor]:
    """Trains and saves; returns the weights as they were before."""
    defense = DEFENSE_CONFIGS[run.defense](**run.settings) if is_defended else None
    given = DATA if is_defended else {"train_dataset": DATA["train_dataset"]}
    trainer = SafetyDefenseSFTTrainer(
        model=model_of(run),
        args=SFTConfig(
            str(output), report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, save_strategy="no", loss_type="nll",
            gradient_checkpointing=False, lr_scheduler_type="constant", logging_steps=10, max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True}, **run.training,
        ),
        processing_class=TOKENIZER,
        defense=defense,
        **given,
    )  # fmt: skip
    before = {name: weight.detach().clone() for name, weight in trainer.model.state_dict().items()}
    trainer.train()
    trainer.save_model()
    return before


def sealed_weights(output: Path) -> dict[str, torch.Tensor]:
    (file,) = output.glob("*.safetensors")
    return load_file(file)


def hold(run: Run) -> str:
    """Holds one run to what is promised; returns how it ended."""
    with tempfile.TemporaryDirectory() as folder:
        defended, plain = Path(folder, "defended"), Path(folder, "plain")
        try:
            before = trained(run, defended, is_defended=True)
        except (UserError, ValidationError) as error:
            return f"refused: {str(error)[:60]}"
        if not (defended / MANIFEST_FILE).is_file():
            return "no manifest"
        verify(defended, defense=run.defense)
        trained(run, plain, is_defended=False)
        ours, theirs = sealed_weights(defended), sealed_weights(plain)
        first = {name.replace(".default", ""): weight for name, weight in before.items()}
        assert all(weight.isfinite().all() for weight in ours.values()), "weights that are not finite were sealed"
        assert any(not torch.equal(weight, first[name]) for name, weight in ours.items()), "nothing was trained"
        assert any(not torch.equal(weight, theirs[name]) for name, weight in ours.items()), "as without a defense"
        return "sealed"


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    disable_progress_bars()
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    yield
    logging.disable(disabled)


@fuzz(15)
@given(runs())
def test_a_sealed_model_was_changed_by_its_defense(run: Run) -> None:
    hold(run)


@pytest.mark.slow
@fuzz(300)
@given(runs())
def test_a_sealed_model_was_changed_by_its_defense_whatever_the_settings(run: Run) -> None:
    hold(run)
