"""Predictions on fake tensors against real steps of models that fit here."""

from __future__ import annotations

import pytest

from tests.planner.measured import drawn, measured, predicted
from tvac_plugin.args import TVaccineConfig, VaccineConfig

ARMS = {
    "none": (None, None),
    "vaccine": (VaccineConfig(), None),
    "t_vaccine": (TVaccineConfig(num_active_layers=2), drawn(1, 3)),
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gpt_neox", "mistral"])
@pytest.mark.parametrize("adapter", ["lora", None])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_parameters_are_exact_and_saved_activations_within_a_tenth(family, adapter, checkpointing):
    for name, (config, state) in ARMS.items():
        how = {"adapter": adapter, "checkpointing": checkpointing, "state": state}
        cost = predicted(family, config, **how)
        saved, parameters = measured(family, config, **how)
        buffers = cost.at_peak["weights"] + cost.at_peak["adapters"] - parameters
        assert 0 <= buffers <= 200, name  # rotary frequencies
        assert cost.saved == pytest.approx(saved, rel=0.1), name
