"""The ledger against PyTorch's own tracker, and 4-bit weights against bitsandbytes."""

from __future__ import annotations

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from tests.support.models import random_batch, tiny_model
from tvac_plugin.planner.fake_model import build_fake_model
from tvac_plugin.planner.ledger import Ledger
from tvac_plugin.planner.step import StepCounter
from tvac_plugin.planner.workload import read_workload


def test_peak_and_work_are_those_of_pytorch_s_own_counters():
    batch = random_batch(rows=4, length=24)
    counts = {}
    for name, tracker in (("torch", MemTracker()), ("ours", Ledger())):
        model = tiny_model()
        if name == "torch":
            tracker.track_external(model, *batch.values())
        else:
            tracker.own([*model.parameters(), *model.buffers(), *batch.values()], "weights")
        with FlopCounterMode(display=False) as work, tracker:
            model(**batch).loss.backward()
        counts[name] = (tracker, work.get_total_flops())
    snapshot = counts["torch"][0].get_tracker_snapshot("peak")[torch.device("cpu")]
    assert counts["ours"][0].cost.peak == pytest.approx(snapshot["Total"], rel=0.01)
    assert counts["ours"][0].cost.flops == counts["torch"][1]


def test_4_bit_weights_have_the_bytes_of_real_ones():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 2}
    workload = read_workload({"adapter": "qlora", "load_in_4bit": True, "lora_target_modules": ["q_proj"]})
    model = build_fake_model(tiny_model(**sizes).config, workload)
    packed = {n: p for n, p in model.module.named_parameters() if getattr(p, "quant_state", None) is not None}
    assert len(packed) == 14
    weight = next(p for name, p in packed.items() if "down_proj" in name)
    real, state = bitsandbytes.functional.quantize_4bit(
        torch.randn(128, 256, dtype=torch.bfloat16), compress_statistics=True, quant_type="nf4",
        quant_storage=torch.bfloat16,
    )  # fmt: skip
    assert weight.untyped_storage().nbytes() == real.untyped_storage().nbytes() == 128 * 256 // 2
    assert weight.quant_state.absmax.nbytes == state.absmax.nbytes == 128 * 256 // 64
    assert weight.quant_state.state2.absmax.nbytes == state.state2.absmax.nbytes


def test_4_bit_weights_take_the_work_of_16_bit_ones():
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 2}
    settings = {"load_in_4bit": True, "lora_target_linear": True, "sequence_len": 16}
    config, flops = tiny_model(**sizes).config, []
    for adapter in ("lora", "qlora"):
        workload = read_workload({**settings, "adapter": adapter})
        counter = StepCounter(build_fake_model(config, workload), workload, set())
        flops.append(counter.count(None).flops)
    assert flops[0] == flops[1]


def test_a_processor_that_packs_4_bit_weights_for_evaluation_changes_no_plan(monkeypatch):
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 2}
    recipe = {"adapter": "qlora", "load_in_4bit": True, "lora_target_linear": True, "sequence_len": 16}
    config, workload, costs = tiny_model(**sizes).config, read_workload(recipe), []
    for packs in (False, True):
        monkeypatch.setattr(modules, "has_avx512bf16", lambda packs=packs: packs)
        model = build_fake_model(config, workload)
        before = [tensor.shape for tensor in model.frozen()]
        counter = StepCounter(model, workload, set())  # tries the head in evaluation
        assert [tensor.shape for tensor in model.frozen()] == before
        costs.append(counter.count(None))
    assert costs[0] == costs[1]
