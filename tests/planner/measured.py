"""The same step on real tensors, and what autograd really keeps in it."""

from __future__ import annotations

import torch

from tests.support.models import random_batch, tiny_model, with_lora
from tvac_plugin.defenses import Position, build_defense
from tvac_plugin.defenses.testing import PlainHost
from tvac_plugin.model.answer_head import answers_only, find_answer_head
from tvac_plugin.planner.fake_model import build_fake_model
from tvac_plugin.planner.step import StepCounter
from tvac_plugin.planner.workload import read_workload

ROWS, LENGTH, PROMPT = 3, 16, 6
SHARE = (LENGTH - PROMPT) / (LENGTH - 1)
AFTER_THE_DRAW = Position(1, starts_step=False)


def drawn(*layers):
    return {"num_probes": 1, "probabilities": None, "active_layers": list(layers)}


def settings(family, *, adapter, checkpointing):
    targets = {"gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]}
    llama = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return {
        "adapter": adapter,
        "lora_r": 2,
        "lora_dropout": 0.1,
        "lora_target_modules": targets.get(family, llama),
        "bf16": False,
        "micro_batch_size": ROWS,
        "sequence_len": LENGTH,
        "gradient_checkpointing": checkpointing,
        "attn_implementation": "eager",
        "optimizer": "adamw_torch",
    }


def planned_counter(family, *, adapter, checkpointing, **sizes):
    workload = read_workload(settings(family, adapter=adapter, checkpointing=checkpointing), answer_share=SHARE)
    return StepCounter(build_fake_model(tiny_model(family, **sizes).config, workload), workload, set())


class AnswersHost(PlainHost):
    """Reads answer tokens only, as the trainer's host does."""

    def __init__(self, model, head):
        super().__init__(model)
        self._head = head

    def _mean_loss(self, batch):
        with answers_only(self._head, batch, logits=False) as inputs:
            return super()._mean_loss(inputs)


class Kept:
    """Bytes that autograd keeps: storages once, parameters and buffers left out."""

    def __init__(self, model):
        self._own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self._counts: dict[int, int] = {}
        self.now = self.peak = 0

    def pack(self, tensor):
        return _Handle(self, tensor)

    def add(self, storage, sign):
        key = storage.data_ptr()
        if key in self._own:
            return
        before = self._counts.get(key, 0)
        self._counts[key] = before + sign
        if bool(before) != bool(before + sign):
            self.now += sign * storage.nbytes()
            self.peak = max(self.peak, self.now)


class _Handle:
    def __init__(self, kept, tensor):
        self.kept, self.tensor = kept, tensor.detach()
        kept.add(self.tensor.untyped_storage(), 1)

    def __del__(self):
        self.kept.add(self.tensor.untyped_storage(), -1)


def measured(family, config, *, adapter, checkpointing, state=None, **sizes):
    """Bytes that autograd keeps at most, and bytes of all parameters, in a real step."""
    model = tiny_model(family, **sizes)
    if adapter:
        model = with_lora(model, dropout=0.1)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    head = None if config is None else find_answer_head(model)
    host = PlainHost(model) if head is None else AnswersHost(model, head)
    batch, kept = random_batch(rows=ROWS, length=LENGTH, prompt=PROMPT), Kept(model)
    defense = None if config is None else build_defense(config, model, seed=0)
    if state:
        defense.load_state_dict(state)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda handle: handle.tensor):
        if defense is None:
            host.train(batch)
        else:
            defense.step(host, batch, AFTER_THE_DRAW)
    return kept.peak, sum(p.numel() * p.element_size() for p in model.parameters())
