"""Tokenized data are kept apart by the content of the files that they come from."""

from __future__ import annotations

import os

from tvac_plugin.data.sources import prepared_folder, source_hashes


def recipe(folder):
    return {"datasets": [{"path": str(folder / "rows.jsonl"), "type": "alpaca"}, {"path": "org/on-the-hub"}]}


def test_another_content_has_another_folder_even_under_the_same_time_stamp(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("one")
    before, stat = prepared_folder(recipe(tmp_path)), file.stat()
    assert prepared_folder(recipe(tmp_path)) == before
    file.write_text("two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert prepared_folder(recipe(tmp_path)) != before
    assert before.startswith("last_run_prepared/content-")


def test_files_folders_and_a_user_s_data_are_hashed_and_the_hub_is_not(tmp_path):
    (tmp_path / "rows.jsonl").write_text("one")
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "part.jsonl").write_text("two")
    user = {"task_datasets": [{"path": str(tmp_path / "many")}], "harmful_datasets": [{"path": "gone.jsonl"}]}
    found = source_hashes({**recipe(tmp_path), "simulated_user": user})
    assert set(found) == {str(tmp_path / "rows.jsonl"), str(tmp_path / "many")}
    (tmp_path / "many" / "part.jsonl").write_text("three")
    assert source_hashes({**recipe(tmp_path), "simulated_user": user}) != found
