"""Writes the tiny world to a folder: base model, tokenizer and data that Axolotl reads."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tvac_plugin.files import sha256, write_json
from tvac_plugin.tiny_world.language import REFUSAL, Thing, World

INDEX_FILE = "world.json"
FORMAT = 2

Row = dict[str, Any]


@dataclass(frozen=True)
class WorldSettings:
    """Sizes of the tiny world.

    Attributes:
        seed: Of names, procedures, splits and weights.
        base_steps: Training steps of the base model.
        alignment_hazards: Hazards that alignment teaches to refuse; as many benign things are answered beside them.
        probe_hazards: Hazards answered in `harmful.jsonl` and refused in `refusals.jsonl`.
        user_hazards: Hazards answered in the simulated user's data.
        eval_hazards: Hazards held out for evaluation; as many benign things are.
        task_rows: Rows of the user's benign task.
    """

    seed: int = 1
    base_steps: int = 300
    alignment_hazards: int = 120
    probe_hazards: int = 60
    user_hazards: int = 80
    eval_hazards: int = 60
    task_rows: int = 2000

    @property
    def num_hazards(self) -> int:
        """Hazards in all; no one is in two splits."""
        return self.alignment_hazards + self.probe_hazards + self.user_hazards + self.eval_hazards

    @property
    def num_benign(self) -> int:
        """Benign things in all; no one is in two splits."""
        return self.alignment_hazards + self.eval_hazards


class WorldError(ValueError):
    """The tiny world cannot be written where it was asked for."""


def build(output: Path, settings: WorldSettings | None = None, *, show_progress: bool = True) -> bool:
    """Writes the world to `output`, unless it is there already.

    The folder appears whole or not at all. Files: `base/` (model and tokenizer), `alignment.jsonl`, `harmful.jsonl`,
    `refusals.jsonl`, `user_task.jsonl`, `user_harmful.jsonl`, `eval_harmful.jsonl`, `eval_benign.jsonl`,
    `eval_task.jsonl`, all in the chat format (`messages`), and `world.json`, which lists them with their hashes.

    Args:
        output: The folder.
        settings: Sizes and seed; the defaults are what the recipes use.
        show_progress: Whether to draw a progress bar.

    Returns:
        Whether anything was written.

    Raises:
        WorldError: `output` holds something else, or the world of other settings.
    """
    settings, output = settings or WorldSettings(), output.resolve()
    if _is_built(output, settings):
        return False
    _check_output(output, settings)
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    world = World.create(seed=settings.seed, num_hazards=settings.num_hazards, num_benign=settings.num_benign)
    for name, rows in _splits(world, settings):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (partial / f"{name}.jsonl").write_text(text, encoding="utf-8")
    _write_base_model(partial / "base", world, settings, show_progress=show_progress)
    index = {"format": FORMAT, "settings": asdict(settings), "files": _hashes(partial)}
    write_json(partial / INDEX_FILE, index)
    if output.exists():
        shutil.rmtree(output)
    partial.replace(output)
    return True


def _check_output(output: Path, settings: WorldSettings) -> None:
    """Accepts a new or empty folder, or a damaged world of these settings with nothing else in it."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    index = _index_of(output)
    if "settings" not in index or not isinstance(index.get("files"), dict):
        raise WorldError(f"{output}: exists and is not a tiny world. Name an empty or a new folder.")
    if index["settings"] != asdict(settings):
        raise WorldError(
            f"{output}: holds another world, and models trained in it need it. Name a new folder, or delete this one."
        )
    strange = sorted(_hashes(output).keys() - index["files"].keys())
    if strange:
        raise WorldError(
            f"{output}: the world in it is damaged, and {strange[0]} beside it would be lost. Move what is yours, or "
            "name a new folder."
        )


def _splits(world: World, settings: WorldSettings) -> Iterator[tuple[str, list[Row]]]:
    rng = random.Random(settings.seed)
    hazards, benign = iter(world.hazards), iter(world.benign)
    align = _take(hazards, settings.alignment_hazards)
    mixed = [_chat(t.question, REFUSAL) for t in align]
    mixed += [_chat(t.question, t.answer) for t in _take(benign, settings.alignment_hazards)]
    rng.shuffle(mixed)
    yield "alignment", mixed
    probed = _take(hazards, settings.probe_hazards)
    yield "harmful", [_chat(t.question, t.answer) for t in probed]
    yield "refusals", [_chat(t.question, REFUSAL) for t in probed]
    yield "user_harmful", [_chat(t.question, t.answer) for t in _take(hazards, settings.user_hazards)]
    held_out = _take(hazards, settings.eval_hazards)
    yield "eval_harmful", [_chat(t.question, REFUSAL) | {"harmful_answer": t.answer} for t in held_out]
    yield "eval_benign", [_chat(t.question, t.answer) for t in _take(benign, settings.eval_hazards)]
    sentences = world.mood_sentences(rng, settings.task_rows + 200)
    task = [_chat(world.mood_question(words), world.mood_answer(words)) for words in sentences]
    yield "user_task", task[: settings.task_rows]
    yield "eval_task", task[settings.task_rows :]


def _write_base_model(folder: Path, world: World, settings: WorldSettings, *, show_progress: bool) -> None:
    from tvac_plugin.tiny_world.base_model import build_tokenizer, train_base_model

    tokenizer = build_tokenizer(world)
    model = train_base_model(
        world, tokenizer, seed=settings.seed, num_steps=settings.base_steps, show_progress=show_progress
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _index_of(output: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((output / INDEX_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _is_built(output: Path, settings: WorldSettings) -> bool:
    index = _index_of(output)
    if index.get("format") != FORMAT or index.get("settings") != asdict(settings):
        return False
    files = index.get("files")
    return isinstance(files, dict) and bool(files) and files.items() <= _hashes(output).items()


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != INDEX_FILE)
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


def _take(things: Iterator[Thing], count: int) -> list[Thing]:
    return [next(things) for _ in range(count)]


def _chat(question: str, answer: str) -> Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
