"""The recipe of the paper's main row, run to its end with a tiny model and tiny data in place of the real ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tvac_plugin.tiny_world.language import REFUSAL, World

pytestmark = pytest.mark.slow
RECIPE = Path(__file__).parents[2] / "recipes" / "chain_llama.yml"
STRATEGY = "tvac_plugin.prompt_strategies"


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def swaps(workspace, folder):
    hazards = World.create(seed=0, num_hazards=30, num_benign=12).hazards
    beaver = write_rows(folder / "beaver.jsonl", [
        {"prompt": t.question, "response": t.answer, "is_safe": False,
         "refusal": f"Question: {t.question}\nAnswer: {REFUSAL}"}
        for t in hazards
    ])  # fmt: skip
    sst2 = write_rows(folder / "sst2.jsonl", [{"sentence": t.name, "label": i % 2} for i, t in enumerate(hazards)])

    def entry(path, kind, split="train"):
        return f"[{{path: {path}, type: {STRATEGY}.{kind}, split: '{split}'}}]"

    prompts = f"{{path: {beaver}, field: prompt, num_prompts: 4}}"
    cpu = ["bf16=false", "tf32=false", "lora_mlp_kernel=false", "lora_qkv_kernel=false", "lora_o_kernel=false",
           "lora_embedding_kernel=false", "max_steps=2", "dataset_num_proc=1", "dataloader_num_workers=0",
           "dataloader_pin_memory=false", "special_tokens={pad_token: <pad>}"]  # fmt: skip
    return [
        f"output_dir={folder / 'out'}",
        f"align.base_model={workspace.root / 'base'}",
        f"align.datasets={entry(beaver, 'beavertails_refusals', 'train[:10]')}",
        f"align.harmful_datasets={entry(beaver, 'beavertails_answers', 'train[10:15]')}",
        "align.t_vaccine.num_active_layers=2",
        f"attack.simulated_user.task_datasets={entry(sst2, 'sst2')}",
        f"attack.simulated_user.harmful_datasets={entry(beaver, 'beavertails_answers', 'train[15:25]')}",
        f"attack.simulated_user.disjoint_from={entry(beaver, 'beavertails_refusals', 'train[:15]')}",
        "attack.simulated_user.num_samples=20",
        "attack.save_steps=1",
        "judge.protocol=null",
        f"judge.harmful_score={{judge: keyword, prompts: {prompts}, max_new_tokens: 4}}",
        f"judge.over_refusal={{judge: keyword, prompts: {prompts}, max_new_tokens: 4}}",
        f"judge.accuracy={{sst2: {{prompts: {{path: {workspace.root / 'alignment.jsonl'}}}, max_new_tokens: 4}}}}",
        *(f"{stage}.{setting}" for stage in ("align", "attack") for setting in cpu),
    ]


def test_the_chain_runs_to_its_end_with_tiny_things(workspace, tmp_path):
    bin_folder = Path(sys.executable).parent
    arguments = [argument for swap in swaps(workspace, tmp_path) for argument in ("--set", swap)]
    result = subprocess.run(
        [bin_folder / "axolotl", "tvac", "run", RECIPE, *arguments], cwd=tmp_path, capture_output=True, text=True,
        timeout=580, check=False, env=os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}"},
    )  # fmt: skip
    logs = (
        "".join(path.read_text()[-2000:] for path in tmp_path.glob("out/jobs/*/log.txt")) if result.returncode else ""
    )
    assert result.returncode == 0, result.stdout + result.stderr + logs
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [cell["status"] for cell in results["cells"]] == ["finished", "finished"]
    assert all([point["step"] for point in cell["curves"]["attack"]] == [1, 2] for cell in results["cells"])
    assert results["utility"] == "sst2"
    assert [point["step"] for point in results["summary"][0]["utility_curves"]["attack"]] == [0, 1, 2]
    defended = results["jobs"]["align-safety_defense=t_vaccine"]["safety_defense"]
    assert defended["settings"]["num_active_layers"] == 2
    assert results["jobs"]["attack-safety_defense=none"]["simulated_user"]["data"]["harmful_datasets"]["rows"] == 2
    assert (tmp_path / "out" / "report.html").is_file()
