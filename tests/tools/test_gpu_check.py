"""`tools/gpu_check.py`: real runs beside their predictions, on a small shape and without a GPU."""

from __future__ import annotations

import json
import sys

import pytest

from tools import gpu_check

SMALL = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 512, "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 9, "num_attention_heads": 4, "num_key_value_heads": 4,
    "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip
ON_A_CPU = {"bf16": False, "tf32": False, "micro_batch_size": 2, "sequence_len": 64, "gradient_checkpointing": False}


def test_the_table_has_what_was_measured_beside_what_was_predicted():
    arm = {"measured": {"seconds": 2.0, "gib": 20.5}, "predicted": {"gib": 21.0, "relative_time": 1.0}}
    slower = {"measured": {"seconds": 3.0, "gib": 22.0}, "predicted": {"gib": 23.0, "relative_time": 1.6}}
    broken = {"measured": {"failed": "CUDA out of memory"}, "predicted": {"gib": 99.0, "relative_time": 2.0}}
    text = gpu_check.table({"llama_2_7b": {"none": arm, "t_vaccine": slower, "vaccine": broken}})
    assert [line.split()[1:] for line in text.splitlines()[1:3]] == [
        ["none", "20.50", "21.00", "2.000", "1.00", "1.00"],
        ["t_vaccine", "22.00", "23.00", "3.000", "1.50", "1.60"],
    ]
    assert "failed" in text.splitlines()[3]


@pytest.mark.slow
def test_every_run_trains_and_is_not_run_again(tmp_path, monkeypatch, capsys):
    (tmp_path / "small.json").write_text(json.dumps(SMALL))
    changes = [f"--set={key}={json.dumps(value)}" for key, value in ON_A_CPU.items()]
    arguments = ["gpu_check", f"--output={tmp_path / 'out'}", f"--shape={tmp_path / 'small.json'}", "--no-english"]
    monkeypatch.setattr("sys.argv", arguments + changes)
    gpu_check.main()
    found = json.loads((tmp_path / "out" / "gpu_check.json").read_text())["shapes"]["small"]
    assert found.keys() == set(gpu_check.DEFENSES)
    assert all(arm["measured"]["seconds"] > 0 for arm in found.values()), found
    monkeypatch.setattr(gpu_check, "train", None)
    gpu_check.main()
    assert capsys.readouterr().out.count("t_vaccine") == 2


@pytest.fixture
def small_run(tmp_path, monkeypatch):
    """Runs the tool on a small shape, with what a training would have measured."""
    (tmp_path / "small.json").write_text(json.dumps(SMALL))
    changes = [f"--set={key}={json.dumps(value)}" for key, value in ON_A_CPU.items()]

    def run(measure, *arguments):
        monkeypatch.setattr(gpu_check, "train", measure)
        shape = f"--shape={tmp_path / 'small.json'}"
        given = ["gpu_check", f"--output={tmp_path / 'out'}", shape, "--no-english", *changes, *arguments]
        monkeypatch.setattr("sys.argv", given)
        gpu_check.main()
        return json.loads((tmp_path / "out" / "gpu_check.json").read_text())["shapes"]["small"]

    return run


def test_what_failed_is_run_again_and_what_succeeded_is_not(small_run):
    asked = []

    def fails_once(recipe, folder):
        asked.append(recipe["safety_defense"])
        is_broken = asked == ["none", "vaccine"]
        return {"failed": "out of memory"} if is_broken else {"seconds": 1.0, "gib": 2.0}

    assert "failed" in small_run(fails_once)["vaccine"]["measured"]
    assert small_run(fails_once)["vaccine"]["measured"] == {"seconds": 1.0, "gib": 2.0}
    assert asked == ["none", "vaccine", "t_vaccine", "vaccine"]


def test_results_of_other_settings_are_not_added_to(small_run, capsys):
    small_run(lambda recipe, folder: {"seconds": 1.0, "gib": 2.0})
    with pytest.raises(SystemExit):
        small_run(None, "--set=lora_r=4")
    assert "with another --set. Give another --output." in capsys.readouterr().err


def test_a_command_that_fails_is_told_with_its_last_lines(tmp_path, monkeypatch):
    code = "print('CUDA out of memory'); raise SystemExit(3)"
    lines = gpu_check._lines
    monkeypatch.setattr(gpu_check, "_lines", lambda command: lines([sys.executable, "-c", code]))
    found = gpu_check.train({"output_dir": str(tmp_path / "run")}, tmp_path)
    assert "exit status 3" in found["failed"]
    assert "CUDA out of memory" in found["failed"]
