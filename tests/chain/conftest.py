"""A small chain in a folder of its own, and what tests ask of its traces."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

ALIGN = {
    "base_model": "base", "plugins": ["tvac_plugin.SafetyDefensePlugin"], "safety_defense": "vaccine",
    "adapter": "lora",
    "datasets": [{"path": "alignment.jsonl", "type": "alpaca"}], "seed": 1,
}  # fmt: skip
ATTACK = {
    "base_model": "replaced", "plugins": ["tvac_plugin.SafetyDefensePlugin"], "safety_defense": "none",
    "simulated_user": {"num_samples": 10, "harmful_ratio": 0.1, "seed": 1,
                       "task_datasets": [{"path": "t", "type": "x"}], "harmful_datasets": [{"path": "h", "type": "x"}]},
}  # fmt: skip
JUDGE = {"harmful_score": {"judge": "procedure", "prompts": {"path": "held_out.jsonl"}}, "output_dir": "unused"}
STAGES = [
    {"name": "align", "train": "align.yml"},
    {"name": "attack", "train": "attack.yml", "model_from": "align"},
    {"name": "judge", "evaluate": "judge.yml", "models": ["base", "align", "attack"], "checkpoints": True},
]


@pytest.fixture
def chain(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(*, align=None, attack=None, judge=None, **changes):
        recipe = {
            "stages": STAGES,
            "matrix": {"safety_defense": ["none", "vaccine"]},
            "output_dir": str(tmp_path / "out"),
        }
        for name, content in (
            ("align", ALIGN | (align or {})),
            ("attack", ATTACK | (attack or {})),
            ("judge", JUDGE | (judge or {})),
        ):
            (tmp_path / f"{name}.yml").write_text(yaml.safe_dump(content))
        if not (tmp_path / "alignment.jsonl").exists():
            (tmp_path / "alignment.jsonl").write_text("a")
        (tmp_path / "chain.yml").write_text(yaml.safe_dump(recipe | changes))
        return tmp_path / "chain.yml"

    return write


def timeless(results):
    text = json.loads(json.dumps(results))
    for job in text["jobs"].values():
        job["seconds"] = job["peak_memory_mb"] = None
    return text


def started(folder):
    return {path.parent.name: path.stat().st_mtime_ns for path in Path(folder).glob("jobs/*/log.txt")}
