"""The baseline that `make bench` compares with."""

from __future__ import annotations

from pathlib import Path

import tvac_plugin.bench
from tvac_plugin.bench.baseline import comparison_problem
from tvac_plugin.bench.results import read_results
from tvac_plugin.bench.settings import MEASURED, Settings
from tvac_plugin.bench.shape import Shape

LATER: set[str] = {"oasis", "ctrap", "seam", "circuit_breaker", "crl"}
"""Defenses that came after the baseline and are not in it yet."""
FILE = Path(tvac_plugin.bench.__file__).parent / "baseline.json"


def test_the_command_without_options_can_be_compared_with_it():
    baseline = read_results(FILE)
    assert comparison_problem(baseline, Shape(), Settings()) is None
    assert set(MEASURED) - LATER <= set(baseline.main.cases)
