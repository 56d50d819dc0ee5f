"""Stands in for `axolotl` in tests of the chain: as deterministic, and takes a tenth of a second."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import yaml

NO_MANIFEST = 99.0
"""The coefficient with which a `lox` job forgets its manifest."""


def manifest_of(*arguments, **options):
    sys.path.insert(0, str(Path(__file__).parents[2]))  # this file is run as a script
    from tests.support import manifests

    return manifests.manifest_of(*arguments, **options)


def fake_plan(path, overrides=()):
    """The plan of a chain with this file's `main` as every command."""
    from tvac_plugin.chain.recipe import read_chain

    return faked(read_chain(Path(path), overrides))


def faked(chain):
    """The plan of a chain that is read already."""
    from tvac_plugin.chain.jobs import ChainPlan

    plan = ChainPlan(chain)
    for job_id, job in plan.jobs.items():
        command = (sys.executable, __file__, job.kind, str(job.recipe_file))
        plan.jobs[job_id] = dataclasses.replace(job, command=command)
    return plan


def run(path, overrides=(), num_parallel=1, say=lambda line: None):
    """Runs a chain with fake commands and collects its results."""
    from tvac_plugin.chain.command import run_chain
    from tvac_plugin.chain.recipe import read_chain

    return run_chain(read_chain(Path(path), overrides), say=say, num_parallel=num_parallel, plan_of=faked)


def main(kind, recipe_file):
    recipe = yaml.safe_load(Path(recipe_file).read_text())
    output = Path(recipe["output"] if kind == "lox" else recipe["output_dir"])
    output.mkdir(parents=True)
    sys.stdout.write(f"threads {os.environ.get('OMP_NUM_THREADS')}\n")
    time.sleep(600 if os.environ.get("FAKE_HANGS") else 0.05)
    if recipe.get("meet"):
        meet(Path(recipe["meet"]))
    if recipe.get("fail"):
        sys.exit("ValueError: told to fail")
    {"train": train, "lox": lox, "merge": merge, "evaluate": evaluate}[kind](recipe, output)
    time.sleep(0.05)


def meet(folder):
    """Waits until another job is here at the same time."""
    folder.mkdir(exist_ok=True)
    (folder / str(os.getpid())).touch()
    deadline = time.monotonic() + 20
    while len(list(folder.iterdir())) < 2:
        if time.monotonic() > deadline:
            sys.exit("ValueError: nobody came")
        time.sleep(0.01)


def train(recipe, output):
    plain = {key: value for key, value in recipe.items() if "dir" not in key and "path" not in key}
    base = Path(plain.pop("base_model")) / "model.safetensors"
    content = json.dumps(plain, sort_keys=True, default=str).encode() + (base.read_bytes() if base.exists() else b"")
    (output / "adapter_model.safetensors").write_bytes(content)
    trace = [{"step": 1, "event": "draw", "layers": [0]}]
    if recipe.get("still_falling"):
        trace += [{"step": n, "event": "step", "loss": 3 - n / 40} for n in range(40)]
    (output / "safety_trace.jsonl").write_text("".join(json.dumps(line) + "\n" for line in trace))
    digest = {"adapter_model.safetensors": hashlib.sha256(content).hexdigest()}
    if recipe.get("safety_defense", "none") != "none" and not recipe.get("forget_manifest"):
        manifest = manifest_of(digest, defense=recipe["safety_defense"])
        (output / "safety_defense.json").write_text(json.dumps(manifest))
    if "simulated_user" in recipe:
        (output / "simulated_user.json").write_text("{}")
        for step in (10, 20):
            folder = output / f"checkpoint-{step}"
            folder.mkdir()
            (folder / "model.safetensors").write_bytes(content + bytes(step))
            (folder / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": step, "loss": 1.5}]}))


def lox(recipe, output):
    aligned = Path(recipe["aligned"]) / "adapter_model.safetensors"
    content = aligned.read_bytes() + f"{recipe['rank']} {recipe['coefficient']}".encode()
    (output / aligned.name).write_bytes(content)
    if recipe["coefficient"] != NO_MANIFEST:
        manifest = manifest_of({aligned.name: hashlib.sha256(content).hexdigest()}, defense="lox")
        (output / "safety_defense.json").write_text(json.dumps(manifest))


def merge(recipe, output):
    source = Path(str(output).replace(".merged", "")) / "adapter_model.safetensors"
    (output / "merged").mkdir()
    (output / "merged" / "model.safetensors").write_bytes(source.read_bytes())


def evaluate(recipe, output):
    models = dict(recipe["models"])
    if recipe.get("checkpoints_of"):
        models |= {f"step {s}": str(Path(recipe["checkpoints_of"]) / f"checkpoint-{s}") for s in (10, 20)}
    results = {}
    for name, path in models.items():
        weights = b"".join(file.read_bytes() for file in sorted(Path(path).glob("*.safetensors")))
        measures = [*(["harmful_score"] if "harmful_score" in recipe else []), *recipe.get("accuracy", {})]
        results[name] = {measure: rate_of(weights, measure) for measure in measures}
    (output / "answers").mkdir()
    for name in models:
        answer = {"prompt": "q", "answer": name, "harmful": True}
        (output / "answers" / f"{name}.harmful_score.jsonl").write_text(json.dumps(answer) + "\n")
    (output / "evaluation.json").write_text(json.dumps({"models": results}))


def rate_of(weights, measure):
    salt = b"" if measure == "harmful_score" else measure.encode()
    percent = int(hashlib.sha256(weights + salt).hexdigest(), 16) % 1000 / 10
    return {
        "percent": percent, "low": max(0, percent - 5), "high": min(100, percent + 5), "num_scored": 60,
        "num_unscored": 0, "judge": "procedure", "prompts_sha256": "p",
    }  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1] == "chain":
        run(sys.argv[2], num_parallel=int(sys.argv[3]))
    else:
        main(*sys.argv[1:3])
