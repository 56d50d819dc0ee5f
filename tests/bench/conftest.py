from __future__ import annotations

import pytest

from tvac_plugin.bench.run import benchmark
from tvac_plugin.bench.settings import Settings
from tvac_plugin.bench.shape import Shape

TINY = Shape(
    num_layers=3, hidden_size=64, sequence_len=8, batch_size=2, num_active_layers=1, vocabulary_size=64, lora_rank=2
)


@pytest.fixture(scope="session")
def results():
    return benchmark(TINY, Settings(defenses=["t_vaccine", "vaccine"], repeats=2, warmup=0, draws=3, threads=1))
