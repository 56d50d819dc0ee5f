"""Data beside the training data are tokenized by Axolotl, in this process, and nothing of them is left on disk."""

from __future__ import annotations

import pytest
from axolotl.utils.data import sft
from axolotl.utils.dict import DictDefault
from datasets import Dataset
from transformers import AutoTokenizer

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.data.loading import tokenize


@pytest.fixture
def cfg(workspace, tmp_path):
    counts = dict.fromkeys(("micro_batch_size", "gradient_accumulation_steps", "batch_size", "num_epochs"), 1)
    settings = counts | {"sequence_len": 64, "dataset_num_proc": 1, "world_size": 1, "train_on_inputs": False}
    return DictDefault(
        harmful_datasets=workspace.entries("harmful"), dataset_prepared_path=str(tmp_path / "prepared"),
        chat_template="tokenizer_default", push_dataset_to_hub="somebody/rows", **settings,
    )  # fmt: skip


def test_its_rows_are_neither_saved_nor_pushed_to_the_hub(cfg, workspace, tmp_path):
    rows = tokenize(cfg, AutoTokenizer.from_pretrained(workspace.root / "base"), "harmful_datasets")
    assert len(rows) == 12
    assert not [path for path in (tmp_path / "prepared").rglob("*") if path.suffix in (".arrow", ".json")]


def test_axolotl_preprocess_saves_them_and_pushes_them_nowhere_either(cfg, workspace, tmp_path, monkeypatch):
    monkeypatch.setattr(Dataset, "push_to_hub", lambda *_args, **_options: pytest.fail("pushed"))
    tokenizer = AutoTokenizer.from_pretrained(workspace.root / "base")
    cfg.is_preprocess = True
    before = tokenize(cfg, tokenizer, "harmful_datasets")
    assert len([path for path in (tmp_path / "prepared").rglob("*") if path.suffix == ".arrow"]) == 1
    cfg.is_preprocess = None
    monkeypatch.setattr(sft, "_load_raw_datasets", lambda *_: pytest.fail("tokenized again"))
    assert tokenize(cfg, tokenizer, "harmful_datasets")["input_ids"] == before["input_ids"]


def test_axolotl_saves_its_own_rows_as_before_whatever_happened(cfg, workspace):
    save = sft.save_preprocessed_dataset
    cfg.harmful_datasets[0].path = str(workspace.root / "gone.jsonl")
    with pytest.raises(UserError, match="harmful_datasets: cannot be loaded"):
        tokenize(cfg, AutoTokenizer.from_pretrained(workspace.root / "base"), "harmful_datasets")
    assert sft.save_preprocessed_dataset is save
