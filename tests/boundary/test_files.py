"""Folders: which can be written to, and which are checkpoints; files that are written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.chain.conftest import chain  # noqa: F401 (a fixture)
from tests.support.full_disk import full_disk
from tests.support.sft_runs import in_child
from tvac_plugin.boundary.errors import UserError
from tvac_plugin.boundary.files import checkpoints, refuse_unwritable, write_all, write_json, write_text
from tvac_plugin.cli import tvac

NOBODY = 65534


def refused_as_user(folder):
    def attempt():
        if os.geteuid() == 0:
            os.setuid(NOBODY)
        with pytest.raises(UserError, match="Permission denied.*Fix that or set another `output_dir:`"):
            refuse_unwritable(folder)

    return in_child(attempt) == 0


def test_a_folder_that_may_not_be_written_to_is_refused(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert refused_as_user(tmp_path / "locked")
    assert refused_as_user(tmp_path / "locked" / "deep" / "out")


def test_a_read_only_file_system_is_called_so(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(os, "statvfs", lambda _: type("Mount", (), {"f_flag": os.ST_RDONLY}))
    with pytest.raises(UserError, match=r"out: nothing can be written here \(.*: Read-only file system\)"):
        refuse_unwritable(tmp_path / "out")


def test_what_is_no_folder_is_refused_at_any_depth(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for folder in (tmp_path / "file", tmp_path / "file" / "deep" / "out", tmp_path / "nowhere"):
        with pytest.raises(UserError, match="(file|nowhere): Not a directory"):
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
        assert "Fix that" in result.output


def test_json_goes_into_a_file_or_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("mine")
    assert CliRunner().invoke(tvac, ["schema", "--output", str(tmp_path / "new" / "schema.json")]).exit_code == 0
    assert "t_vaccine" in json.loads((tmp_path / "new" / "schema.json").read_text())["properties"]
    result = CliRunner().invoke(tvac, ["schema", "--output", str(tmp_path / "file" / "schema.json")])
    assert result.exit_code == 1
    assert f"{tmp_path}/file/schema.json: File exists. Make room or fix that" in result.output
    assert (tmp_path / "file").read_text() == "mine"


def test_checkpoints_are_sorted_by_step_and_nothing_else_is_one(tmp_path):
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-final", "checkpoint-1-old", "checkpoint-", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-11").write_text("no folder")
    assert checkpoints(tmp_path) == {9: tmp_path / "checkpoint-9", 10: tmp_path / "checkpoint-10"}
    assert list(checkpoints(tmp_path)) == [9, 10]
    assert checkpoints(tmp_path / "gone") == {}


def test_a_full_disk_leaves_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "facts.json"
    write_json(path, {"a": 1})
    with full_disk(), pytest.raises(UserError, match=r"facts\.json: File too large. Make room"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["facts.json"]


def test_a_file_that_cannot_take_its_place_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "facts.json"
    write_json(path, {"a": 1})

    def refused(*_):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(UserError, match=r"facts\.json: Permission denied. Make room"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["facts.json"]


@pytest.mark.parametrize("link", ["report.html", "report.html.tmp"])
def test_a_link_in_the_place_of_a_file_does_not_lead_out_of_its_folder(tmp_path, link):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / link).symlink_to(tmp_path / "mine")
    write_text(tmp_path / "out" / "report.html", "page")
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "out" / "report.html").read_text() == "page"
    assert not (tmp_path / "out" / "report.html").is_symlink()


def test_a_written_file_is_as_readable_as_any_other(tmp_path):
    (tmp_path / "other").write_text("")
    write_text(tmp_path / "file", "half of a pair: \ud800")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert (tmp_path / "file").read_text() == "half of a pair: ?"


def test_of_many_files_none_is_written_when_one_cannot_be(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "a.yml").write_text("before")
    write = Path.write_text

    def full(path, text, **options):
        if path.name == "b.yml":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="No space left on device. Make room"):
        write_all(folder, {"a.yml": "after", "b.yml": "after"}, overwrite=True)
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("a.yml", "before")]


def test_of_many_files_none_takes_the_place_of_a_folder(tmp_path):
    (tmp_path / "data" / "b.yml").mkdir(parents=True)
    with pytest.raises(UserError, match=r"data/b.yml would be overwritten"):
        write_all(tmp_path, {"a.yml": "\ud800", "data/b.yml": "x"}, overwrite=True)
    assert not (tmp_path / "a.yml").exists()
