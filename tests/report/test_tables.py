"""What the report calls a run."""

from __future__ import annotations

import pytest

from tvac_plugin.report.tables import label


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"safety_defense": "t_vaccine", "align.t_vaccine.rho": 1.5, "seed": 2}, "t_vaccine + rho=1.5, seed 2"),
        ({"safety_defense": "none", "attack.safety_defense": "lisa"}, "none + attack.safety_defense=lisa"),
        ({"safety_defense": "tar", "a.tar.lr": 1, "b.tar.lr": 2}, "tar + a.tar.lr=1 + b.tar.lr=2"),
    ],
)
def test_a_run_is_called_after_its_arm_without_repeating_the_defense(params, words):
    assert label({"params": params, "arm": [key for key in params if "." in key]}) == words
