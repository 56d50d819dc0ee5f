"""One process of a launch: `torchrun -m tests.processes.worker OUTPUT NAME...` trains with each defense named.

Each run is trained, then resumed from its checkpoint by a new trainer; `NAME:window` steps once per batch, has dropout,
and resumes between two logs and within an epoch. With `fail` as the last name, one more run is started in which the
second process raises while the first writes a checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.processes.runs import CHECKPOINT, NUM_PROCESSES, WINDOW, trainer, weights
from tests.support.sft_runs import logs
from tvac_plugin.trainers import mixin

RANK = int(os.environ["RANK"])


def main(output: Path, names: list[str]) -> None:
    """Runs them in order."""
    torch.set_num_threads(1)
    for name in names:
        if name == "fail":
            _fail(output / name)
        else:
            defense, _, variant = name.partition(":")
            _train(output / name, defense, **(WINDOW if variant else {}))


def _train(output: Path, name: str, **changes: Any) -> None:
    for stage, checkpoint in (("whole", None), ("resumed", str(output / f"checkpoint-{CHECKPOINT}"))):
        run = trainer(output, name, num_processes=NUM_PROCESSES, **changes)
        run.train(resume_from_checkpoint=checkpoint)
        (output / f"{stage}-{RANK}.logs.json").write_text(json.dumps(logs(run)))
        run.save_model(str(output / stage))
        save_file(weights(run.model), output / f"{stage}-{RANK}.safetensors")
        if RANK == 0:
            shutil.copy(output / "safety_trace.jsonl", output / f"{stage}.jsonl")


def _fail(output: Path) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("one process cannot go on")

    if RANK == 1:
        mixin.save_window = fail
    trainer(output, "t_vaccine", num_processes=NUM_PROCESSES).train()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
