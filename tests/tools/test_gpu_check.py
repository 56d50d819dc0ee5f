"""`tools/gpu_check.py`: real runs beside their predictions, on a small shape and without a GPU."""

from __future__ import annotations

import json

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
