"""The audit of dependencies finds what it should, needs no network, and says when it did not look."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

spec = importlib.util.spec_from_file_location("audit", Path(__file__).parents[2] / "tools" / "audit.py")
audit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(audit)


class Metadata(dict):
    def get_all(self, key, default):
        return self.get(key, default)


def package(version="1.0", **metadata):
    return SimpleNamespace(version=version, metadata=Metadata(metadata))


def test_everything_that_is_installed_is_pinned_and_licensed():
    packages = audit.installed()
    assert {"torch", "transformers", "axolotl", "pytest"} <= packages.keys()
    assert audit.pin_findings(packages, audit.read_pins(audit.CONSTRAINTS.read_text())) == []
    assert audit.licence_findings(packages) == []


def test_an_unpinned_or_other_version_is_found():
    packages = {"a": package("1.0"), "b": package("2.0+cpu"), "c": package("3.0"), "nvidia-x": package()}
    found = audit.pin_findings(packages, audit.read_pins("# x==1\nB==2.0\nc==3.1\n"))
    assert [(name, "not in" in problem, "pinned to 3.1" in problem) for name, problem in found] == [
        ("a", True, False), ("c", False, True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("metadata", "is_allowed"),
    [
        ({"License": "MIT"}, True), ({"License-Expression": "Apache-2.0 AND BSD-3-Clause"}, True), ({}, False),
        ({"License": "GPL-3.0"}, False), ({"License": "Commercial"}, False), ({"License": "AGPL-3.0-only"}, False),
        ({"Classifier": ["License :: OSI Approved :: BSD License"]}, True),
    ],
)  # fmt: skip
def test_licences_are_held_against_a_list(metadata, is_allowed):
    assert (audit.licence_findings({"a": package(**metadata)}) == []) is is_allowed


def program(monkeypatch, output, error=""):
    monkeypatch.setattr(audit.shutil, "which", lambda name: name)
    done = SimpleNamespace(stdout=output, stderr=error, returncode=0)
    monkeypatch.setattr(audit.subprocess, "run", lambda *a, **k: done)


def test_a_missing_tool_and_a_missing_service_are_said_and_are_no_failure(monkeypatch):
    monkeypatch.setattr(audit.shutil, "which", lambda name: None)
    assert audit.known_holes() == (
        [],
        "NOT CHECKED for known holes: pip-audit is not installed (`pip install pip-audit`).",
    )
    program(monkeypatch, "", "Traceback\nConnectionError: no route")
    assert audit.known_holes() == ([], "NOT CHECKED for known holes: ConnectionError: no route")


def test_holes_are_findings_and_skipped_packages_are_named(monkeypatch):
    entries = [
        {"name": "a", "version": "1", "vulns": [{"id": "X-1", "fix_versions": ["2"]}]},
        {"name": "b", "version": "1", "vulns": []},
        {"name": "c", "skip_reason": "not found"},
    ]
    program(monkeypatch, json.dumps({"dependencies": entries}))
    holes, line = audit.known_holes()
    assert holes == [("a", "1 has X-1; fixed in ['2'].")]
    assert line == "2 packages checked for known holes, NOT CHECKED: c."
