"""Training runs that are the same in one process and in several, up to who computes what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from trl import SFTConfig

from tests.support.models import tiny_model, with_lora
from tvac_plugin import SafetyDefenseSFTTrainer
from tvac_plugin.configs.base import DefenseConfig
from tvac_plugin.configs.collapse import CTRAPConfig, SEAMConfig  # fmt: skip
from tvac_plugin.configs.fine_tuning import LisaConfig  # fmt: skip
from tvac_plugin.configs.perturbation import OASISConfig, RandomNoiseConfig, TVaccineConfig, VaccineConfig  # fmt: skip
from tvac_plugin.configs.representations import CircuitBreakerConfig, CRLConfig  # fmt: skip
from tvac_plugin.configs.unlearning import BoosterConfig, RepNoiseConfig, TARConfig  # fmt: skip
from tvac_plugin.tiny_world.base_model import build_tokenizer
from tvac_plugin.tiny_world.language import REFUSAL, World

NUM_PROCESSES = 2
NUM_STEPS = 4
CHECKPOINT = 2
WINDOW: dict[str, Any] = {"gradient_accumulation_steps": 1, "max_steps": 6, "logging_steps": 3, "dropout": 0.3}
_BATCH, _ACCUMULATION, _STREAM = 2, 2, 2


def defenses(num_processes: int) -> dict[str, DefenseConfig]:
    """Every defense, with batches of its own data that are as large over all processes together."""
    rows = _STREAM * NUM_PROCESSES // num_processes
    probe: dict[str, Any] = {
        "rho": 1.0, "num_active_layers": 2, "resample_steps": 1, "probe_steps": 2, "probe_batch_size": rows,
    }  # fmt: skip
    return {
        "t_vaccine": TVaccineConfig(**probe),
        "t_vaccine_attention": TVaccineConfig(freeze="attention", **probe),
        "t_vaccine_none": TVaccineConfig(freeze="none", rho_scope="sample", perturb="layer", **probe),
        "t_vaccine_relative": TVaccineConfig(
            layer_sampling="relative_gradient_norm", rho_scale="relative", rho_scope="sample", **probe
        ),
        "vaccine": VaccineConfig(rho=1.0),
        "oasis": OASISConfig(rho=1.0, num_active_layers=2, probe_steps=2, probe_batch_size=rows),
        "random_noise": RandomNoiseConfig(rho=1.0),
        "rep_noise": RepNoiseConfig(batch_size=rows, beta=1.0),
        "tar": TARConfig(
            inner_steps=2, tamper_every=1, batch_size=rows, adversary_batch_size=rows, held_out=0.5,
            adversary_learning_rates=[1e-2],
        ),
        "booster": BoosterConfig(batch_size=rows),
        "ctrap": CTRAPConfig(batch_size=rows),
        "circuit_breaker": CircuitBreakerConfig(batch_size=rows),
        "crl": CRLConfig(batch_size=rows),
        "seam": SEAMConfig(batch_size=rows, self_destruct_scale=0.1, probe_step_size=0.1),
        "lisa": LisaConfig(alignment_steps=1, user_steps=2, batch_size=rows, warmup_ratio=0.25),
    }  # fmt: skip


def trainer(output: Path, name: str, *, num_processes: int, **changes: Any) -> SafetyDefenseSFTTrainer:
    """A run whose optimizer steps see the same rows in any number of processes."""
    config = changes.pop("defense", None) or defenses(num_processes)[name]
    dropout = changes.pop("dropout", 0.0)
    world = World.create(seed=0, num_hazards=32, num_benign=16)
    tokenizer = build_tokenizer(world)
    given = {
        "harmful_datasets": _rows(world.hazards[16:], refuse=False),
        "refusal_datasets": _rows(world.hazards[16:], refuse=True),
        "retain_datasets": _rows(world.benign, refuse=False),
        "alignment_datasets": _rows(world.hazards[16:], refuse=True),
    }
    settings: dict[str, Any] = {
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": _BATCH,
        "gradient_accumulation_steps": _ACCUMULATION * NUM_PROCESSES // num_processes,
        "optim": "sgd",
        "learning_rate": 0.3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": CHECKPOINT,
        "report_to": [],
        "use_cpu": True,
        "ddp_backend": "gloo" if num_processes > 1 else None,
        "bf16": False,
        "loss_type": "nll",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    return SafetyDefenseSFTTrainer(
        model=with_lora(tiny_model(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1), dropout=dropout),
        args=SFTConfig(str(output), **settings | changes),
        train_dataset=_rows(world.hazards[:16], refuse=True),
        processing_class=tokenizer,
        defense=config,
        **{key.removesuffix("s"): given[key] for key in config.data_keys()},
    )


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what learns."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """L2 distance between two models."""
    return float(torch.stack([(first[name] - second[name]).square().sum() for name in first]).sum().sqrt())


def _rows(things: Any, *, refuse: bool) -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": thing.question}],
                "completion": [{"role": "assistant", "content": REFUSAL if refuse else thing.answer}],
            }
            for thing in things
        ]
    )
