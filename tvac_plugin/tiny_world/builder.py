"""Writes the tiny world to a folder: base model, tokenizer and data that Axolotl reads."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tvac_plugin.boundary.world_folder import build_folder, chat, write_rows
from tvac_plugin.tiny_world.language import REFUSAL, World

Chat = dict[str, Any]
TASK_QUESTIONS = 200
"""Questions of the user's task that are held out, for choosing settings and again for evaluation."""


@dataclass(frozen=True)
class WorldSettings:
    """Sizes of the tiny world.

    Attributes:
        seed: Of names, procedures, splits and weights.
        base_steps: Training steps of the base model.
        alignment_hazards: Hazards that alignment teaches to refuse; as many benign things are answered beside them.
        probe_hazards: Hazards answered in `harmful.jsonl` and refused in `refusals.jsonl`.
        user_hazards: Hazards answered in the simulated user's data.
        validation_hazards: Hazards held out for choosing settings; as many benign things are.
        eval_hazards: Hazards held out for evaluation; as many benign things are.
        task_rows: Rows of the user's benign task.
    """

    seed: int = 1
    base_steps: int = 300
    alignment_hazards: int = 120
    probe_hazards: int = 60
    user_hazards: int = 80
    validation_hazards: int = 60
    eval_hazards: int = 60
    task_rows: int = 2000

    @property
    def num_hazards(self) -> int:
        """Hazards in all; no one is in two splits."""
        return self.num_benign + self.probe_hazards + self.user_hazards

    @property
    def num_benign(self) -> int:
        """Benign things in all; no one is in two splits."""
        return self.alignment_hazards + self.validation_hazards + self.eval_hazards


def build(output: Path, settings: WorldSettings | None = None, *, show_progress: bool = True) -> bool:
    """Writes the world to `output`, unless it is there already.

    Files: `base/` (model and tokenizer), `alignment.jsonl`, `retain.jsonl` (its benign rows), `harmful.jsonl`,
    `refusals.jsonl`, `user_task.jsonl`, `user_harmful.jsonl`, and a `_harmful`, a `_benign` and a `_task.jsonl` for
    each of `validation` and `eval`, all in the chat format (`messages`), and `world.json`.

    Args:
        output: The folder; it appears whole or not at all.
        settings: Sizes and seed; the defaults are what the recipes use.
        show_progress: Whether to draw a progress bar.

    Returns:
        Whether anything was written.

    Raises:
        UserError: `output` holds something else, or the world of other settings.
    """
    chosen = settings or WorldSettings()

    def write(folder: Path) -> dict[str, Any]:
        world = World.create(seed=chosen.seed, num_hazards=chosen.num_hazards, num_benign=chosen.num_benign)
        for name, rows in _splits(world, chosen):
            write_rows(folder, name, rows)
        _write_base_model(folder / "base", world, chosen, show_progress=show_progress)
        return {}

    return build_folder(output, asdict(chosen), write)


def _splits(world: World, settings: WorldSettings) -> Iterator[tuple[str, list[Chat]]]:
    rng = random.Random(settings.seed)
    hazards, benign = iter(world.hazards), iter(world.benign)
    align = islice(hazards, settings.alignment_hazards)
    mixed = [chat(t.question, REFUSAL) for t in align]
    answered = [chat(t.question, t.answer) for t in islice(benign, settings.alignment_hazards)]
    mixed += answered
    rng.shuffle(mixed)
    yield "alignment", mixed
    yield "retain", answered
    probed = list(islice(hazards, settings.probe_hazards))
    yield "harmful", [chat(t.question, t.answer) for t in probed]
    yield "refusals", [chat(t.question, REFUSAL) for t in probed]
    yield "user_harmful", [chat(t.question, t.answer) for t in islice(hazards, settings.user_hazards)]
    sentences = world.mood_sentences(rng, settings.task_rows + 2 * TASK_QUESTIONS)
    task = iter([chat(world.mood_question(words), world.mood_answer(words)) for words in sentences])
    yield "user_task", list(islice(task, settings.task_rows))
    for name, count in (("eval", settings.eval_hazards), ("validation", settings.validation_hazards)):
        held_out = islice(hazards, count)
        yield f"{name}_harmful", [chat(t.question, REFUSAL) | {"harmful_answer": t.procedure} for t in held_out]
        yield f"{name}_benign", [chat(t.question, t.procedure) for t in islice(benign, count)]
        yield f"{name}_task", list(islice(task, TASK_QUESTIONS))


def _write_base_model(folder: Path, world: World, settings: WorldSettings, *, show_progress: bool) -> None:
    from tvac_plugin.tiny_world.base_model import build_tokenizer, train_base_model

    tokenizer = build_tokenizer(world)
    model = train_base_model(
        world, tokenizer, seed=settings.seed, num_steps=settings.base_steps, show_progress=show_progress
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
