"""Predictions on fake tensors against real steps of models that fit here."""

from __future__ import annotations

import pytest

from tests.planner.measured import AFTER_THE_DRAW, drawn, measured, planned_counter
from tvac_plugin.configs.perturbation import OASISConfig, TVaccineConfig, VaccineConfig
from tvac_plugin.defenses import OASIS

SIZES = {"num_hidden_layers": 3}
ARMS = {
    "none": (None, None),
    "vaccine": (VaccineConfig(), None),
    "t_vaccine": (TVaccineConfig(num_active_layers=1), drawn(1)),
    "oasis": (OASISConfig(num_active_layers=1), OASIS.state_with([1])),
}
LEAN = [
    ("llama", "lora", False),
    ("qwen2", "lora", True),
    ("qwen3", None, False),
    ("mistral", None, True),
    ("gemma2", "lora", False),
    ("gpt_neox", "lora", True),
]
ALL = [
    (family, adapter, checkpointing)
    for family in ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt_neox")
    for adapter in ("lora", None)
    for checkpointing in (False, True)
]


def check(family, adapter, checkpointing):
    how = {"adapter": adapter, "checkpointing": checkpointing}
    counter = planned_counter(family, **how, **SIZES)
    for name, (config, state) in ARMS.items():
        cost = counter.count(config, position=AFTER_THE_DRAW, state=state)
        saved, parameters = measured(family, config, state=state, **how, **SIZES)
        buffers = cost.at_peak["weights"] + cost.at_peak["adapters"] - parameters
        assert 0 <= buffers <= 200, name  # rotary frequencies
        assert cost.saved == pytest.approx(saved, rel=0.1), name


@pytest.mark.parametrize(("family", "adapter", "checkpointing"), LEAN)
def test_parameters_are_exact_and_saved_activations_within_a_tenth(family, adapter, checkpointing):
    check(family, adapter, checkpointing)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "adapter", "checkpointing"), [case for case in ALL if case not in LEAN])
def test_they_are_for_all_others_too(family, adapter, checkpointing):
    check(family, adapter, checkpointing)
