"""Folders: which can be written to, and which are checkpoints."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.chain.conftest import chain  # noqa: F401 (a fixture)
from tests.sft_runs import in_child
from tvac_plugin.cli import tvac
from tvac_plugin.files import OutputError, checkpoints, refuse_unwritable

NOBODY = 65534


def refused_as_user(folder):
    def attempt():
        if os.geteuid() == 0:
            os.setuid(NOBODY)
        with pytest.raises(OutputError, match="Permission denied.*Mend that or set another `output_dir:`"):
            refuse_unwritable(folder)

    return in_child(attempt) == 0


def test_a_folder_that_may_not_be_written_to_is_refused(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert refused_as_user(tmp_path / "locked")
    assert refused_as_user(tmp_path / "locked" / "deep" / "out")


def test_a_read_only_file_system_is_called_so(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(os, "statvfs", lambda _: type("Mount", (), {"f_flag": os.ST_RDONLY}))
    with pytest.raises(OutputError, match=r"out: nothing can be written here \(.*: Read-only file system\)"):
        refuse_unwritable(tmp_path / "out")


def test_what_is_no_folder_is_refused_at_any_depth(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for folder in (tmp_path / "file", tmp_path / "file" / "deep" / "out", tmp_path / "nowhere"):
        with pytest.raises(OutputError, match="(file|nowhere): Not a directory"):
            refuse_unwritable(folder)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_can_be_made_is_not_made_yet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refuse_unwritable(tmp_path / "a" / "b")
    refuse_unwritable(Path("relative"))
    assert not list(tmp_path.iterdir())


def test_commands_that_cannot_write_say_so_in_one_sentence(chain, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "file").write_text("mine")
    recipe = chain(output_dir=str(tmp_path / "file" / "out"))
    commands = (["run", str(recipe)], ["run", str(recipe), "--dry-run"], ["tiny-world", "--output", "file/world"])
    monkeypatch.chdir(tmp_path)
    for command in commands:
        result = CliRunner().invoke(tvac, command)
        assert isinstance(result.exception, SystemExit), result.exception
        assert "Not a directory: " in result.output
        assert "file" in result.output
        assert "Mend that" in result.output


def test_json_goes_into_a_file_or_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("mine")
    assert CliRunner().invoke(tvac, ["schema", "--output", str(tmp_path / "new" / "schema.json")]).exit_code == 0
    assert "t_vaccine" in json.loads((tmp_path / "new" / "schema.json").read_text())["properties"]
    result = CliRunner().invoke(tvac, ["schema", "--output", str(tmp_path / "file" / "schema.json")])
    assert result.exit_code == 1
    assert f"--output {tmp_path}/file/schema.json: File exists; make room or mend that" in result.output
    assert (tmp_path / "file").read_text() == "mine"


def test_checkpoints_are_sorted_by_step_and_nothing_else_is_one(tmp_path):
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-final", "checkpoint-1-old", "checkpoint-", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-11").write_text("no folder")
    assert checkpoints(tmp_path) == {9: tmp_path / "checkpoint-9", 10: tmp_path / "checkpoint-10"}
    assert list(checkpoints(tmp_path)) == [9, 10]
    assert checkpoints(tmp_path / "gone") == {}
