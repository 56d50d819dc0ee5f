"""One process of a launch: `torchrun -m tests.processes.axolotl_worker RECIPE` trains with Axolotl on the CPU.

`axolotl train` places a second process on a second device, which a CPU is not; here that is undone after loading.
Beside the recipe it notes which process wrote which proof.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import yaml


def main(recipe: Path) -> None:
    """Does what `axolotl train` does in each process."""
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.cli.train import do_train
    from axolotl.utils.dict import DictDefault

    torch.set_num_threads(1)
    _note_who_writes(recipe.with_name("writers.txt"))
    cfg = load_cfg(DictDefault(yaml.safe_load(recipe.read_text(encoding="utf-8"))))
    cfg.device_map = None
    do_train(cfg, TrainerCliArgs())


def _note_who_writes(notes: Path) -> None:
    from tvac_plugin.boundary.files import write_json
    from tvac_plugin.data import simulated_user
    from tvac_plugin.provenance import manifest

    def noting(path: Path, value: Any) -> None:
        with notes.open("a", encoding="utf-8") as file:
            file.write(f"{os.environ['RANK']} {path.name}\n")
        write_json(path, value)

    for module in (simulated_user, manifest):
        module.write_json = noting


if __name__ == "__main__":
    os.environ["ACCELERATE_USE_CPU"] = "true"
    main(Path(sys.argv[1]))
