"""The figure shows what a defense's own probe finds."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.support.workspace import save_base
from tvac_plugin.tiny_world.language import World


@pytest.fixture
def tool():
    path = Path(__file__).parents[2] / "tools" / "draw_probe.py"
    spec = importlib.util.spec_from_file_location("draw_probe", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path):
    world = World.create(seed=0, num_hazards=4, num_benign=2)
    save_base(tmp_path, world)
    chats = [[("user", thing.question), ("assistant", thing.answer)] for thing in world.hazards]
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_the_figure_has_a_bar_for_each_layer_and_score(tool, folder, capsys):
    tool.main([str(folder), str(folder / "rows.jsonl"), str(folder / "probe.svg")])
    printed = dict(line.split(": ") for line in capsys.readouterr().out.strip().splitlines())
    assert list(printed) == list(tool.SCORES)
    for values in printed.values():
        assert sum(map(float, values.split())) == pytest.approx(1, abs=0.01)
    num_layers = len(printed["gradient_norm"].split())
    assert (folder / "probe.svg").read_text().count("<rect") == 2 * num_layers


def test_only_answers_are_labelled(tool, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    batch = tool.batch_of(rows, tokenizer)
    for row, labels in zip(rows, batch["labels"], strict=True):
        answer = tokenizer.decode(labels[labels != -100])
        assert row["messages"][1]["content"] in answer
        assert row["messages"][0]["content"] not in answer
