"""A folder with a tiny untrained model and tiny data, and recipes over it."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tests.support.models import tiny_model
from tvac_plugin.tiny_world.base_model import build_tokenizer
from tvac_plugin.tiny_world.language import REFUSAL, World

PLUGIN = "tvac_plugin.SafetyDefensePlugin"


def save_base(folder: Path, world: World) -> None:
    """Writes a random small model with the world's tokenizer."""
    tokenizer = build_tokenizer(world)
    tiny_model(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, bos_token_id=None).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Workspace:
    """Makes the files once; `recipe` names them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        world = World.create(seed=0, num_hazards=30, num_benign=12)
        save_base(root / "base", world)
        rows = [(t.question, REFUSAL) for t in world.hazards[:12]] + [(t.question, t.answer) for t in world.benign]
        random.Random(0).shuffle(rows)
        self.write("alignment.jsonl", rows)
        self.write("harmful.jsonl", [(t.question, t.answer) for t in world.hazards[12:24]])
        self.write("refusals.jsonl", [(t.question, REFUSAL) for t in world.hazards[12:24]])
        self.write("user_harmful.jsonl", [(t.question, t.answer) for t in world.hazards[24:]])
        self.write("user_task.jsonl", [(t.question + " again", t.answer) for t in world.benign])
        self.write("retain.jsonl", [(t.question, t.answer) for t in world.benign])
        self.write("held_out.jsonl", [(t.question, REFUSAL) for t in world.hazards[24:]])

    def write(self, name: str, rows: Sequence[tuple[str, str]]) -> Path:
        """Writes chat rows to a JSONL file in the workspace."""
        lines = [
            json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]})
            for q, a in rows
        ]
        path = self.root / name
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    def entries(self, name: str) -> list[dict[str, Any]]:
        """Data set entries for one file of the workspace."""
        return [{"path": str(self.root / f"{name}.jsonl"), "type": "chat_template"}]

    def recipe(self, output: Path, **changes: Any) -> dict[str, Any]:
        """A T-Vaccine recipe of four steps; a change to `None` removes the key."""
        recipe = {
            "base_model": str(self.root / "base"),
            "plugins": [PLUGIN],
            "safety_defense": "t_vaccine",
            "harmful_datasets": [{"path": str(self.root / "harmful.jsonl"), "type": "chat_template"}],
            "t_vaccine": {
                "rho": 1.0,
                "num_active_layers": 2,
                "resample_steps": 2,
                "probe_steps": 3,
                "probe_batch_size": 4,
            },
            "datasets": [{"path": str(self.root / "alignment.jsonl"), "type": "chat_template"}],
            "chat_template": "tokenizer_default",
            "dataset_prepared_path": str(self.root / "prepared"),
            "val_set_size": 0,
            "sequence_len": 64,
            "adapter": "lora",
            "lora_r": 2,
            "lora_alpha": 4,
            "lora_dropout": 0.1,
            "lora_target_modules": ["q_proj", "v_proj", "down_proj"],
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "max_steps": 4,
            "num_epochs": 10,
            "learning_rate": 1e-2,
            "optimizer": "adamw_torch",
            "lr_scheduler": "constant",
            "bf16": False,
            "fp16": False,
            "tf32": False,
            "attn_implementation": "sdpa",
            "seed": 42,
            "dataloader_num_workers": 0,
            "dataloader_pin_memory": False,
            "dataset_num_proc": 1,
            "logging_steps": 1,
            "save_strategy": "no",
            "output_dir": str(output),
        }
        recipe |= changes
        return {key: value for key, value in recipe.items() if value is not None}


def axolotl_train(recipe: dict[str, Any]) -> Path:
    """Does in this process what `axolotl train` does in another; returns the output folder."""
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.cli.train import do_train
    from axolotl.utils.dict import DictDefault

    do_train(load_cfg(DictDefault(recipe)), TrainerCliArgs())
    return Path(recipe["output_dir"])


def adapter(output: Path) -> dict[str, Any]:
    """The adapter's tensors in an output folder."""
    return load_file(output / "adapter_model.safetensors")


def trace(output: Path) -> list[dict[str, Any]]:
    """The trace in an output folder."""
    return [json.loads(line) for line in (output / "safety_trace.jsonl").read_text().splitlines()]
