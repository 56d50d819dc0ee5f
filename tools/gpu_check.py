"""Runs on a GPU what was only predicted so far, and says how far the predictions were off: `make gpu-check`.

For the shapes of Llama-2-7B and Llama-3.1-8B, with random weights, `axolotl train` takes some steps without a defense,
with Vaccine and with T-Vaccine, which draws layers at every step. Their mean step time, and the memory of their worst
step, stand beside the planner's for the same draws. Then the English chain runs in bfloat16. All of it goes to
`gpu_check.json` in the output folder, and a table to the screen. What has succeeded is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from tvac_plugin.boundary.files import write_json
from tvac_plugin.boundary.world_folder import chat, write_rows
from tvac_plugin.planner import make_plan
from tvac_plugin.provenance.trace import TRACE_FILE
from tvac_plugin.recipes.reading import read_recipe
from tvac_plugin.tiny_world.base_model import build_tokenizer
from tvac_plugin.tiny_world.language import World

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "models" / "llama_3_1_8b_lora.yml"
SHAPES = [ROOT / "recipes" / "shapes" / f"{name}.json" for name in ("llama_2_7b", "llama_3_8b")]
DEFENSES = ("none", "vaccine", "t_vaccine")
WARM_UP = 4
"""Steps that are not timed: the first ones also load kernels and probe layers."""
_LOGGED = re.compile(r"\{.*'loss': .*\}")
_MEMORY = re.compile(r"'memory/max_allocated \(GiB\)': '?([0-9.]+)")


def write_base(folder: Path, shape: Path, dtype: torch.dtype) -> None:
    """Saves a model of a shape with random weights, and the tiny world's tokenizer beside it."""
    tokenizer = build_tokenizer(World.create(seed=0, num_hazards=1, num_benign=1))
    config = AutoConfig.for_model(**json.loads(shape.read_text(encoding="utf-8")))
    config.update({"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "dtype": dtype})
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_data(folder: Path, sequence_len: int) -> None:
    """Writes rows that fill a sequence, half prompt and half answer, to train on and, others, to probe."""
    draw, words = random.Random(0), World.create(seed=0, num_hazards=1, num_benign=1).vocabulary()

    def text() -> str:
        return " ".join(draw.choices(words, k=sequence_len // 2 - 3))

    for name in ("alignment", "harmful"):
        write_rows(folder, name, [chat(text(), text()) for _ in range(400)])


def recipe_of(shape: Path, defense: str, folder: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe for 8B models, on random weights and made-up rows, for some steps."""
    entries = {
        name: [{"path": str(folder / f"{name}.jsonl"), "type": "chat_template"}] for name in ("alignment", "harmful")
    }
    own: dict[str, Any] = {
        "base_model": str(folder / shape.stem),
        "safety_defense": defense,
        "datasets": entries["alignment"],
        "harmful_datasets": entries["harmful"],
        "vaccine": {"rho_scale": "relative", "rho": 0.01},
        "t_vaccine": {"resample_steps": 1},
        "dataset_prepared_path": str(folder / "prepared"),
        "pad_to_sequence_len": True,
        "max_steps": 24,
        "logging_steps": 1,
        "output_dir": str(folder / "runs" / f"{shape.stem}-{defense}"),
    }
    return read_recipe(RECIPE) | own | changes


def train(recipe: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Runs `axolotl train`; returns the mean seconds of a step, from when its lines arrive, and the most memory."""
    path = folder / f"{Path(recipe['output_dir']).name}.yml"
    path.write_text(yaml.safe_dump(dict(recipe), sort_keys=False), encoding="utf-8")
    arrived, memory, lines = [], [], []
    try:
        for line in _lines(["axolotl", "train", str(path)]):
            lines.append(line)
            if _LOGGED.search(line):
                arrived.append(time.monotonic())
                memory += [float(found) for found in _MEMORY.findall(line)]
    except subprocess.CalledProcessError as error:
        return {"failed": f"{error}\n{''.join(lines[-20:])}"}
    seconds = [later - earlier for earlier, later in pairwise(arrived)][WARM_UP:]
    if len(seconds) < WARM_UP:
        return {"failed": f"too few steps were logged\n{''.join(lines[-20:])}"}
    return {"seconds": round(fmean(seconds), 3), "gib": max(memory, default=0.0)}


def _lines(command: list[str]) -> Iterator[str]:
    """What a command prints, as it prints it; raises `CalledProcessError` at its end if it failed."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "AXOLOTL_DO_NOT_TRACK": "1"}
    with subprocess.Popen(  # noqa: S603 (a list, no shell)
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        yield from process.stdout
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def check_shape(
    shape: Path, folder: Path, changes: Mapping[str, Any], before: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """Trains a shape with every defense that has not succeeded `before`, and predicts the same."""
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    if not (folder / shape.stem / "config.json").exists():
        write_base(folder / shape.stem, shape, dtype)
    found = {}
    for defense in DEFENSES:
        if "failed" not in before.get(defense, {"measured": {"failed": "never run"}})["measured"]:
            found[defense] = before[defense]
            continue
        recipe = recipe_of(shape, defense, folder, changes)
        sys.stderr.write(f"{shape.stem}, {defense} ...\n")
        measured, trace = train(recipe, folder), Path(recipe["output_dir"]) / TRACE_FILE
        arm = make_plan(recipe, answer_share=0.5, draws=trace if _has_probe(trace) else None).arms[defense]
        predicted = {"gib": round(arm.peak / 2**30, 2), "relative_time": round(arm.relative_time, 2)}
        found[defense] = {"measured": measured, "predicted": predicted}
    return found


def _has_probe(trace: Path) -> bool:
    return trace.exists() and '"probe"' in trace.read_text(encoding="utf-8")


def english(folder: Path) -> dict[str, Any]:
    """Runs the English chain; returns what it found of both arms."""
    output = folder / "english_chain"
    for command in (
        ["tvac", "english-world", "--output", "outputs/english"],
        [
            "tvac",
            "run",
            "recipes/english/chain.yml",
            "--set",
            "align.bf16=true",
            "--set",
            "attack.bf16=true",
            "--set",
            f"output_dir={output}",
        ],
    ):
        try:
            sys.stderr.writelines(_lines(command))
        except subprocess.CalledProcessError as error:
            return {"failed": str(error)}
    results = output / "results.json"
    return dict(json.loads(results.read_text(encoding="utf-8")))


def table(shapes: Mapping[str, Mapping[str, Any]]) -> str:
    """Measured beside predicted, a line a run."""
    lines = [f"{'shape':14}{'defense':12}{'GiB':>8}{'predicted':>11}{'s a step':>10}{'relative':>10}{'predicted':>11}"]
    lines[0] += "   (GiB of the worst step, mean seconds)"
    for shape, arms in shapes.items():
        plain = arms["none"]["measured"].get("seconds")
        for defense, arm in arms.items():
            measured, predicted = arm["measured"], arm["predicted"]
            if "failed" in measured:
                lines.append(f"{shape:14}{defense:12}  failed; gpu_check.json has its last lines")
                continue
            relative = f"{measured['seconds'] / plain:.2f}" if plain else "-"
            lines.append(
                f"{shape:14}{defense:12}{measured['gib']:8.2f}{predicted['gib']:11.2f}{measured['seconds']:10.3f}"
                f"{relative:>10}{predicted['relative_time']:11.2f}"
            )
    return "\n".join(lines)


def main() -> None:
    """Checks every shape, then the English chain, and writes after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu_check"), help="Folder for everything.")
    parser.add_argument("--shape", type=Path, action="append", help="A config.json; may be repeated.")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="Change a key of the recipe.")
    parser.add_argument("--no-english", action="store_true", help="Leave out the English chain.")
    options = parser.parse_args()
    folder, results = options.output.resolve(), options.output.resolve() / "gpu_check.json"
    folder.mkdir(parents=True, exist_ok=True)
    changes = {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in options.set)}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    shapes = options.shape or SHAPES
    if len({shape.stem for shape in shapes}) < len(shapes):
        parser.error("two shapes have one file name. Rename one: it is what they are called in the results.")
    setting = {"gpu": gpu, "torch": torch.__version__, "changes": changes}
    found: dict[str, Any] = {**setting, "shapes": {}}
    if results.exists():
        found = json.loads(results.read_text(encoding="utf-8"))
        if {key: found.get(key) for key in setting} != setting:
            parser.error(f"{results} was made on another GPU or with another --set. Give another --output.")
    write_data(folder, (read_recipe(RECIPE) | changes)["sequence_len"])
    for shape in shapes:
        found["shapes"][shape.stem] = check_shape(shape, folder, changes, found["shapes"].get(shape.stem, {}))
        write_json(results, found)
    if not options.no_english and "failed" in found.get("english", {"failed": "never run"}):
        found["english"] = english(folder)
        write_json(results, found)
    sys.stdout.write(f"{gpu or 'no GPU: memory is not measured'}\n{table(found['shapes'])}\nresults: {results}\n")


if __name__ == "__main__":
    main()
