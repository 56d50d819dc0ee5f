"""What a job depends on is told by content, also where there is much of it."""

from __future__ import annotations

import pytest

from tests.chain import fake
from tvac_plugin.boundary.errors import UserError
from tvac_plugin.chain import state


def fingerprint_of(path):
    job = next(iter(fake.fake_plan(path).jobs.values()))
    return state.fingerprint(job, [])


def test_more_files_than_can_be_told_apart_are_refused_by_their_folder(chain, tmp_path, monkeypatch):
    monkeypatch.setattr(state, "_MOST_FILES", 2)
    folder = tmp_path / "home"
    folder.mkdir()
    for number in range(3):
        (folder / str(number)).touch()
    with pytest.raises(UserError, match=r"home: more than 2 files. Name the folder in it that holds the data."):
        fingerprint_of(chain(align={"datasets": [{"path": str(folder), "type": "alpaca"}]}))
