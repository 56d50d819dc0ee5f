"""Draws which layers a probe finds: `python tools/draw_probe.py MODEL ROWS.jsonl FIGURE.svg`.

MODEL is a folder with a chat model, ROWS hold harmful questions with answers as `messages`. The figure shows, layer by
layer, with what probability T-Vaccine would draw it first, by the paper's score and by the relative one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tvac_plugin.configs.perturbation import TVaccineConfig
from tvac_plugin.defenses.base import Position
from tvac_plugin.defenses.t_vaccine import TVaccine
from tvac_plugin.defenses.testing import PlainHost
from tvac_plugin.model.types import Batch

SCORES = {
    "gradient_norm": "the paper's score: gradient norm at the attention output",
    "relative_gradient_norm": "gradient norm times output norm",
}
_WIDTH, _PANEL, _LEFT, _TOP, _STYLE = 720, 150, 50, 26, "font: 13px sans-serif; fill: #777"


def batch_of(rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> Batch:
    """All rows in one batch, padded on the right; only answers are labelled."""
    tokens = [tokenizer.apply_chat_template(row["messages"], return_dict=False) for row in rows]
    asked = [
        len(tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, return_dict=False))
        for row in rows
    ]
    width = max(map(len, tokens))
    ids = [row + [tokenizer.pad_token_id] * (width - len(row)) for row in tokens]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in tokens]
    labels = [
        [-100] * start + row[start:] + [-100] * (width - len(row)) for start, row in zip(asked, tokens, strict=True)
    ]
    named = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: torch.tensor(values) for name, values in named.items()}


def probe(model: Any, batch: Batch, score: str) -> list[float]:
    """The probability of each layer, from one probe of the whole batch."""
    defense = TVaccine(TVaccineConfig(num_active_layers=1, layer_sampling=score), model, seed=0)
    one_row = {name: values[:1] for name, values in batch.items()}
    report = defense.step(PlainHost(model, {"probe": [batch]}), one_row, Position(step=0, starts_step=True))
    return list(report.events[0]["probabilities"])


def figure(found: Mapping[str, Sequence[float]]) -> str:
    """One panel of bars for each score, on the same scale."""
    highest = max(map(max, found.values()))
    panels = [
        _panel(values, y=number * (_PANEL + 60), highest=highest, title=SCORES[score])
        for number, (score, values) in enumerate(found.items())
    ]
    height = len(found) * (_PANEL + 60)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}">{"".join(panels)}</svg>\n'


def _panel(values: Sequence[float], *, y: int, highest: float, title: str) -> str:
    step, bottom = (_WIDTH - _LEFT) / len(values), y + _TOP + _PANEL
    bars = "".join(
        f'<rect x="{_LEFT + step * layer:.1f}" y="{bottom - _PANEL * value / highest:.1f}" width="{step * 0.8:.1f}" '
        f'height="{_PANEL * value / highest:.1f}" fill="#4878a8"><title>layer {layer}: {value:.3f}</title></rect>'
        for layer, value in enumerate(values)
    )
    shown = range(0, len(values), 5)
    numbers = "".join(f'<text x="{_LEFT + step * n:.1f}" y="{bottom + 16}" style="{_STYLE}">{n}</text>' for n in shown)
    top = f'<text x="0" y="{y + _TOP + 10}" style="{_STYLE}">{highest:.2f}</text>'
    return f'<text x="{_LEFT}" y="{y + 16}" style="{_STYLE}">{title}</text>{top}{bars}{numbers}'


def main(arguments: Sequence[str]) -> None:
    """Prints the probabilities and writes the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "rows", "figure"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    rows = [json.loads(line) for line in options.rows.read_text(encoding="utf-8").splitlines()]
    found = {score: probe(model, batch_of(rows, tokenizer), score) for score in SCORES}
    for score, values in found.items():
        sys.stdout.write(f"{score}: {' '.join(f'{value:.3f}' for value in values)}\n")
    options.figure.write_text(figure(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
