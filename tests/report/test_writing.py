"""A report is written whole, from results that can be read, or a sentence says why not."""

from __future__ import annotations

import json
import re

import pytest
from click.testing import CliRunner

from tests.report.test_pages import NONE, cell_of, results_of
from tests.support.full_disk import full_disk
from tvac_plugin.cli import tvac


def test_reporting_again_gives_the_same_pages(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(results_of(cell_of(NONE, 80.0))))
    for _ in range(2):
        result = CliRunner().invoke(tvac, ["report", str(tmp_path)])
        assert result.exit_code == 0, result.output
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "report.md").is_file()


def test_a_report_that_cannot_be_written_leaves_the_one_before(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(results_of(cell_of(NONE, 80.0))))
    assert CliRunner().invoke(tvac, ["report", str(tmp_path)]).exit_code == 0
    before = {name: (tmp_path / name).read_text() for name in ("report.html", "report.md")}
    with full_disk():
        result = CliRunner().invoke(tvac, ["report", str(tmp_path)])
    assert result.exit_code == 1
    assert "report.md: File too large. Make room or fix that" in result.output
    assert {name: (tmp_path / name).read_text() for name in before} == before


@pytest.mark.parametrize("content", [None, "", "{}", "[]", '{"summary": [{"models": []}]}', "[" * 100_000])
def test_unreadable_results_are_one_sentence(tmp_path, content):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    result = CliRunner().invoke(tvac, ["report", str(tmp_path)])
    assert result.exit_code == 1
    assert re.search(r"results.json: (no readable results here|not the results of a chain)\. Name the", result.output)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("number", [1, 2, "3"])
def test_results_of_another_version_say_what_to_run(tmp_path, number):
    (tmp_path / "results.json").write_text(json.dumps(results_of(cell_of(NONE, 80.0)) | {"format": number}))
    result = CliRunner().invoke(tvac, ["report", str(tmp_path)])
    assert result.exit_code == 1
    assert f"written by another version (format {number!r}, this one reads 3). Run `axolotl tvac run`" in result.output


def test_a_fault_of_the_report_is_called_one(tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text(json.dumps(results_of(cell_of(NONE, 80.0))))
    monkeypatch.setattr("tvac_plugin.report.pages.sentences", lambda results: results["no such key"])
    result = CliRunner().invoke(tvac, ["report", str(tmp_path)])
    assert result.exit_code == 1
    assert "KeyError: 'no such key'" in result.output
    assert "This is a fault of tvac-plugin, not yours" in result.output
    assert not (tmp_path / "report.html").exists()
