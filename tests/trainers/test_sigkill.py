"""The real command, killed at random moments and resumed until it is done."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import yaml

from tvac_plugin.provenance.manifest import verify

ARTEFACTS = ("safety_trace.jsonl", "safety_defense.json", "adapter_model.safetensors")
KILLS = 4


def start(recipe, path):
    path.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "axolotl.cli.main", "train", str(path), "--launcher", "python"]
    log = path.with_suffix(".log").open("ab")
    return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def kill_after(process, trace, seconds):
    """Waits until the run writes its trace, then `seconds` more; kills it with everything that it started."""
    before = trace.stat().st_mtime if trace.exists() else 0.0
    while process.poll() is None and not (trace.exists() and trace.stat().st_mtime > before):
        time.sleep(0.1)
    time.sleep(seconds)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(workspace, tmp_path):
    changes = {"max_steps": 40, "save_strategy": "steps", "save_steps": 3, "logging_steps": 4, "num_epochs": 40}
    changes |= {"gradient_accumulation_steps": 2, "auto_resume_from_checkpoints": True}
    recipes = {name: workspace.recipe(tmp_path / name, **changes) for name in ("whole", "killed")}
    assert start(recipes["whole"], tmp_path / "whole.yml").wait() == 0
    moments, ends = random.Random(0), []
    for _ in range(KILLS):
        process = start(recipes["killed"], tmp_path / "killed.yml")
        ends.append(kill_after(process, tmp_path / "killed" / "safety_trace.jsonl", moments.uniform(0, 3)))
    assert -signal.SIGKILL in ends
    assert start(recipes["killed"], tmp_path / "killed.yml").wait() == 0
    for name in ARTEFACTS:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert verify(tmp_path / "killed", defense="t_vaccine")["defended_steps"] == 40
    assert not list((tmp_path / "killed").rglob("*.tmp"))
