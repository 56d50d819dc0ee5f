"""The English world with its real weights, by the real commands: ten steps of T-Vaccine, an attack, and answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
RECIPES = Path(__file__).parents[2] / "recipes" / "english"
SHORT = [
    "align.max_steps=10",
    "align.t_vaccine.probe_steps=2",
    "attack.max_steps=4",
    "attack.save_steps=4",
    *(
        f"{stage}.harmful_score.{key}"
        for stage in ("judge", "curve")
        for key in ("prompts.num_prompts=4", "max_new_tokens=8")
    ),
    *(f"{stage}.accuracy.task.prompts.num_prompts=8" for stage in ("judge", "curve")),
    "judge.over_refusal.prompts.num_prompts=4",
    "judge.over_refusal.max_new_tokens=8",
    "judge.retention.prompts.num_prompts=4",
]


def tvac(folder, *arguments):
    """Runs `axolotl tvac` in a folder and returns what it printed."""
    bin_folder = Path(sys.executable).parent
    result = subprocess.run(
        [bin_folder / "axolotl", "tvac", *arguments], cwd=folder, capture_output=True, text=True, timeout=1100,
        check=False, env=os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}"},
    )  # fmt: skip
    logs = "".join(path.read_text()[-2000:] for path in folder.glob("outputs/english_chain/jobs/*/log.txt"))
    assert result.returncode == 0, result.stdout + result.stderr + logs
    return result.stdout


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("english")
    tvac(folder, "english-world", "--output", "outputs/english")
    return folder


def test_the_weights_answer_and_stop_at_the_end_of_their_turn(world):
    from tvac_plugin.evaluation.generation import Generator

    generator = Generator.load(world / "outputs" / "english" / "base")
    assert generator.tokenizer.eos_token == generator.tokenizer.pad_token == "<|im_end|>"
    prompt = generator.prompt("What is the capital of France? Answer with one word.")
    assert prompt.startswith("<|im_start|>user\n"), "no system prompt"
    (answer,) = generator.complete([prompt], max_new_tokens=24, batch_size=1)
    assert "Paris" in answer


def test_ten_steps_of_t_vaccine_are_sealed_attacked_and_judged(world):
    chain = yaml.safe_load((RECIPES / "chain.yml").read_text()) | {"matrix": {"safety_defense": ["t_vaccine"]}}
    for stage in chain["stages"]:
        stage |= {key: str(RECIPES / stage[key]) for key in ("train", "evaluate") if key in stage}
    (world / "chain.yml").write_text(yaml.safe_dump(chain))
    tvac(world, "run", "chain.yml", *(part for setting in SHORT for part in ("--set", setting)))
    output = world / "outputs" / "english_chain"
    results = json.loads((output / "results.json").read_text())
    (cell,) = results["cells"]
    assert cell["status"] == "finished"
    assert {"base", "align", "attack"} <= cell["models"].keys()
    aligned = next((output / "jobs").glob("align*/out/safety_defense.json")).parent
    assert "t_vaccine: 10 of 10 batches defended (all), in 10 of 10 steps." in tvac(world, "verify", str(aligned))
