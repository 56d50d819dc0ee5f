"""Recipes of the shapes that Axolotl's examples have, over a tiny model and rows of nonce words."""

from __future__ import annotations

import json
import random

import pytest
import yaml

from tests.support.workspace import save_base
from tvac_plugin.tiny_world.language import REFUSAL, World

LORA = """\
# my recipe: alpaca and LoRA
base_model: ws/base   # small
# hub_model_id: someone/model

datasets:
  - path: ws/alpaca.jsonl
    type: alpaca

val_set_size: 0.1
output_dir: ./outputs/lora-out

adapter: lora
lora_model_dir:

sequence_len: 64
sample_packing: true
eval_sample_packing: true

lora_r: 4
lora_alpha: 8
lora_target_modules:
  - q_proj
  - v_proj

evals_per_epoch: 4
saves_per_epoch: 1
"""
QLORA = """\
base_model: ws/base
load_in_8bit: false
load_in_4bit: true
chat_template: tokenizer_default
datasets:
- path: ws/chat.jsonl
  type: chat_template
  field_messages: conversations
  message_property_mappings:
    role: from
    content: value

# where it goes
output_dir: ./outputs/qlora-out
val_set_size: 0.0
adapter: qlora
lora_r: 4
lora_alpha: 8
lora_target_linear: true
sequence_len: 64
hub_model_id: someone/model   # mine
# saved once
saves_per_epoch: 1
special_tokens:
"""
FULL = """\
base_model: ws/base
plugins:
  - axolotl.integrations.spectrum.SpectrumPlugin
chat_template: tokenizer_default
datasets:
  - {path: ws/messages.jsonl, type: chat_template, split: "train[:80]"}
output_dir: outputs/full
sequence_len: 64
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: false
"""
COMMON = """\
gradient_accumulation_steps: 2
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_torch
lr_scheduler: cosine
learning_rate: 0.0002
bf16: false
tf32: false
logging_steps: 1
attn_implementation: sdpa
dataset_num_proc: 1
dataloader_num_workers: 0
dataloader_pin_memory: false
# the end
"""
SHAPES = {"lora": LORA + COMMON, "qlora": QLORA + COMMON, "full": FULL + COMMON}


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """A folder `ws` with a model, benign and refused rows in three shapes, and harmful ones."""
    root = tmp_path_factory.mktemp("starter")
    folder = root / "ws"
    folder.mkdir()
    world = World.create(seed=0, num_hazards=60, num_benign=60)
    save_base(folder / "base", world)
    pairs = [(t.question, REFUSAL) for t in world.hazards[:30]] + [(t.question, t.answer) for t in world.benign]
    random.Random(0).shuffle(pairs)
    alpaca = [{"instruction": q, "input": "", "output": a} for q, a in pairs]
    shared = [("from", "value", "human", "gpt", "conversations"), ("role", "content", "user", "assistant", "messages")]
    chats = [
        [{field: [{role: asks, text: q}, {role: answers, text: a}]} for q, a in pairs]
        for role, text, asks, answers, field in shared
    ]
    harmful = [{"prompt": t.question, "response": t.answer, "is_safe": False} for t in world.hazards[20:]]
    safe = {"prompt": "is it", "response": "it is", "is_safe": True}
    refusals = [{"instruction": t.question, "output": REFUSAL} for t in world.hazards[40:]]
    task = [{"question": f"{t.question} again", "answer": "yes"} for t in world.benign]
    files = {"alpaca": alpaca, "chat": chats[0], "messages": chats[1], "refusals": refusals, "task": task}
    for name, values in (files | {"harmful": [*harmful, safe, *harmful]}).items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    return root


@pytest.fixture
def desk(rows, tmp_path, monkeypatch):
    """A folder to work in, with the rows linked and a recipe of each shape."""
    (tmp_path / "ws").symlink_to(rows / "ws")
    for name, text in SHAPES.items():
        yaml.safe_load(text)
        (tmp_path / f"{name}.yml").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path
