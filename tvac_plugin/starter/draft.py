"""What all four recipes of a chain need to know: where its files lie, and what its rows are called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from textwrap import indent, wrap
from typing import Any

import yaml

from tvac_plugin.evaluation.judges import judge_entry
from tvac_plugin.starter.material import FEWEST_HARMFUL, Material

ALIGN, ATTACK, EVALUATE, CHAIN = "align.yml", "attack.yml", "evaluate.yml", "chain.yml"
_FEW_ASKED = 100
_MISSING = (
    f"Missing: harmful prompts with harmful answers, {FEWEST_HARMFUL} at the least and better some hundreds, one JSON "
    'object a line, as {"prompt": ..., "response": ...}. None are shipped. Data sets on the hub that have them: '
    "PKU-Alignment/BeaverTails (rows with is_safe: false) and anonymous4486/repnoise_beavertail (with refusals too), "
    "CC BY-NC 4.0, with offensive text. Save some to a file and start `axolotl tvac init` again with "
    "`--harmful FILE --overwrite`."
)


@dataclass(frozen=True)
class Draft:
    """A chain that is being written.

    Attributes:
        material: Rows and facts.
        recipe: The user's file.
        folder: Where the recipes will lie, as their paths are to name it.
        judge: Who reads the answers.
    """

    material: Material
    recipe: Path
    folder: Path
    judge: str

    @property
    def output(self) -> str:
        """What output folders begin with."""
        return str(self.material.recipe.get("output_dir") or f"./outputs/{self.recipe.stem}").rstrip("/")

    def missing(self) -> list[str]:
        """What the chain still needs, one sentence each."""
        return [] if self.material.probe else [_MISSING]

    def cautions(self) -> list[str]:
        """What to know before the chain is run, one sentence each."""
        num_asked, entry = len(self.material.harmful_asked), judge_entry(self.judge)
        found = []
        if 0 < num_asked < _FEW_ASKED:
            points = round(98 / sqrt(num_asked))
            found.append(
                f"{num_asked} harmful prompts are asked, so a rate is known to about {points} points either way. "
                "More rows in --harmful make it sharper."
            )
        if entry.weights is not None:
            found.append(
                f"The judge `{self.judge}` is a model that the first evaluation takes from the hub, unless it is here "
                f"already: {entry.weights}. `--judge keyword` needs none, and is for trying things out."
            )
        return found

    def path(self, name: str) -> str:
        """A recipe, as commands name it."""
        return (self.folder / name).as_posix()

    def data(self, name: str) -> str:
        """A file of rows, as recipes name it."""
        return (self.folder / "data" / f"{name}.jsonl").as_posix()

    def entry(self, name: str) -> dict[str, Any]:
        """A file of rows as an entry of `datasets:`."""
        first = self.material.recipe["datasets"][0]
        kept = {key: first[key] for key in ("chat_template", "chat_template_jinja") if key in first}
        kind = "alpaca" if self.material.form == "alpaca" else "chat_template"
        return {"path": self.data(name), "type": kind, **kept}

    def slices(self, part: str) -> list[dict[str, Any]]:
        """The recipe's own entries with the `split:` of a part."""
        entries = zip(self.material.recipe["datasets"], self.material.divisions, strict=True)
        return [{**entry, "split": getattr(division, part)} for entry, division in entries]

    @property
    def base_can_answer(self) -> bool:
        """Whether the model before training has the format in which it is asked."""
        base = Path(str(self.material.recipe["base_model"]))
        if self.material.form == "alpaca" or not base.is_dir():
            return True
        config = base / "tokenizer_config.json"
        has_key = config.is_file() and '"chat_template"' in config.read_text(encoding="utf-8")
        return has_key or (base / "chat_template.jinja").is_file()


def comment(lines: Sequence[str]) -> str:
    """Lines of YAML comment; all but commands are wrapped."""
    wrapped = [
        part
        for line in lines
        for part in (
            [line]
            if line.startswith(("Run:", "  "))
            else wrap(line, 116, subsequent_indent="  " * line.startswith("- "))
        )
    ]
    return "".join(f"# {line}\n" for line in wrapped)


def yaml_lines(value: Any, *, by: int = 2) -> str:
    """A value as YAML, indented."""
    return indent(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=10_000), " " * by)
