"""No network when offline variables are set, and no prompt or answer where it is not meant to be."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from tests.report.test_pages import cell_of, results_of
from tests.support.workspace import axolotl_train
from tests.trainers import test_sft as sft
from tvac_plugin import TVaccineConfig
from tvac_plugin.cli import tvac
from tvac_plugin.tiny_world.builder import WorldSettings, build
from tvac_plugin.tiny_world.language import REFUSAL

THREATS = (Path(__file__).parents[2] / "docs" / "explanation" / "threat-model.md").read_text()
NONCE = "zubrelqua"
VOCABULARY = {"tokenizer.json", "vocab.json", "added_tokens.json"}
DEFENSE = TVaccineConfig(rho=0.5, num_active_layers=2, resample_steps=1, probe_steps=2, probe_batch_size=2)


def invoke(*arguments):
    result = CliRunner().invoke(tvac, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output + result.stderr


@pytest.fixture
def marked(workspace):
    """Writes rows with the nonce in every prompt and answer; returns the names in them, which a tokenizer knows."""
    rows = [json.loads(line) for line in (workspace.root / "harmful.jsonl").read_text().splitlines()]
    pairs = [[message["content"] for message in row["messages"]] for row in rows]
    workspace.write("marked.jsonl", [(f"{NONCE} {q}", f"{NONCE} {a}") for q, a in pairs])
    workspace.write("marked_alignment.jsonl", [(f"{NONCE} {NONCE} {q}", f"{NONCE} {REFUSAL}") for q, _ in pairs])
    return {question.split()[-2] for question, _ in pairs}


def quiet_recipe(workspace, output):
    entry = {"type": "chat_template"}
    return workspace.recipe(
        output,
        datasets=[{"path": str(workspace.root / "marked_alignment.jsonl"), **entry}],
        harmful_datasets=[{"path": str(workspace.root / "marked.jsonl"), **entry}],
        dataset_prepared_path=str(output.parent / "prepared"),
        save_strategy="steps", save_steps=2,
    )  # fmt: skip


def files_that_hold(folder, words):
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.name not in VOCABULARY and any(w.encode() in path.read_bytes() for w in words)
    }


def test_check_and_training_say_nothing_of_the_rows_and_stay_offline(
    workspace, tmp_path, marked, heard, blocked, capfd
):
    recipe = quiet_recipe(workspace, tmp_path / "out")
    (tmp_path / "r.yml").write_text(yaml.safe_dump(recipe))
    said = invoke("check", tmp_path / "r.yml")
    axolotl_train(recipe)
    printed = capfd.readouterr()
    text = "\n".join([said, printed.out, printed.err, *heard])
    assert "safety defense on" in text, "the ear hears"
    assert NONCE not in text
    assert not [name for name in marked if name in text]
    assert files_that_hold(tmp_path / "out", [NONCE, *marked]) == set()
    assert blocked == []
    pickles = {path.name for path in (tmp_path / "out").rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")}
    assert pickles
    assert pickles <= set(re.findall(r"`([\w.]+\.(?:bin|pt|pth|pkl))`", THREATS)), "the threat model lists them"


def test_axolotl_s_debug_key_does_print_rows(workspace, tmp_path, marked, heard):
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.utils.dict import DictDefault

    load_datasets(cfg=load_cfg(DictDefault(quiet_recipe(workspace, tmp_path / "out"))), debug=True)
    assert any(name in " ".join(heard) for name in marked), (
        "what the test above would have heard; the threat model says so"
    )


def test_a_malformed_row_is_not_quoted(workspace, tmp_path, heard):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(
        json.dumps({"messages": [{"role": "user", "content": NONCE}, {"role": 3, "content": [NONCE]}]}) + "\n"
    )
    recipe = workspace.recipe(tmp_path / "out", harmful_datasets=[{"path": str(bad), "type": "chat_template"}])
    (tmp_path / "r.yml").write_text(yaml.safe_dump(recipe))
    result = CliRunner().invoke(tvac, ["check", str(tmp_path / "r.yml")])
    assert result.exit_code == 1
    assert NONCE not in result.output + "\n".join(heard)


def test_an_evaluation_keeps_answers_in_one_place_and_stays_offline(workspace, tmp_path, marked, heard, blocked, capfd):
    measure = {"judge": "keyword", "prompts": {"path": str(workspace.root / "marked.jsonl")}, "max_new_tokens": 2}
    recipe = {
        "models": {"m": str(workspace.root / "base")},
        "harmful_score": measure,
        "output_dir": str(tmp_path / "o"),
    }
    (tmp_path / "e.yml").write_text(yaml.safe_dump(recipe))
    said = invoke("evaluate", tmp_path / "e.yml")
    printed = capfd.readouterr()
    assert NONCE not in "\n".join([said, printed.out, printed.err, *heard])
    assert files_that_hold(tmp_path / "o", [NONCE]) == {"answers/m.harmful_score.jsonl"}
    assert blocked == []


def test_a_report_holds_its_samples_and_says_so_and_stays_offline(tmp_path, blocked):
    results = results_of(cell_of({"safety_defense": "none"}, 50.0))
    results["cells"][0]["samples"] = {"attack": [{"prompt": NONCE, "answer": NONCE, "harmful": True}]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert NONCE not in invoke("report", tmp_path)
    assert files_that_hold(tmp_path, [NONCE]) == {"results.json", "report.html"}
    assert "`results.json`" in THREATS
    assert "`report.html`" in THREATS
    assert blocked == []


def test_a_world_a_schema_and_trl_need_no_network(tmp_path, blocked, heard):
    small = WorldSettings(
        base_steps=1, alignment_hazards=4, probe_hazards=4, user_hazards=4, eval_hazards=4, task_rows=4
    )
    build(tmp_path / "world", small, show_progress=False)
    assert {path.suffix for path in (tmp_path / "world" / "base").iterdir()} <= {".json", ".safetensors", ".jinja"}
    json.loads(invoke("schema"))
    sft.trained(tmp_path / "sft", defense=DEFENSE)
    assert blocked == []


def test_the_commands_turn_the_host_s_telemetry_off_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("AXOLOTL_DO_NOT_TRACK")
    invoke("schema")
    assert os.environ["AXOLOTL_DO_NOT_TRACK"] == "1"
    monkeypatch.setenv("AXOLOTL_DO_NOT_TRACK", "0")
    invoke("schema")
    assert os.environ["AXOLOTL_DO_NOT_TRACK"] == "0"
