"""YAML is data: it runs nothing, and says nothing twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from tvac_plugin.cli import tvac
from tvac_plugin.recipes.safe_yaml import parse_document

REFUSED = {
    "twice": ("safety_defense: t_vaccine\nseed: 1\nsafety_defense: none\n", "line 3: `safety_defense:` is given twice"),
    "twice, below": ("a:\n  - {b: 1,\n     b: 2}\n", "line 3: `b:` is given twice"),
    "twice, in a merge": ("a:\n  <<: {b: 1, b: 2}\n", "line 2: `b:` is given twice"),
    "code": ("a: 1\nb: !!python/object/apply:os.system ['touch pwned']\n", "line 2: could not determine a constructor"),
    "name": ("b: !!python/name:os.system\n", "python/name:os.system"),
    "own tag": ("b: !include secrets.yml\n", "line 1: could not determine a constructor for the tag '!include'"),
    "quote": ("a: 1\nb: 'x\nc: 2\n", "line 2 opens a quote that is never closed. Close it."),
    "syntax": ("a: 1\nb: [1, 2\n", "line 2 opens a bracket that is never closed. Close it."),
    "tab": ("a:\n\tb: 1\n", "line 2 begins with a tab. Indent with spaces."),
    "too far": ("a:\n  b: 1\n   c: 2\n", "line 3 is indented too far, has a second colon"),
    "second colon": ("a: b: c\n", "line 1 is indented too far, has a second colon"),
    "not far enough": ("a:\n  b: 1\n c: 2\n", "line 3 or the one above it is indented unlike its neighbours"),
    "list": ("a: 1\n- b\n", "line 2 begins a list where a key is expected. Indent it below the key"),
    "no colon": ("a: 1\nb 2\nc: 3\n", "line 2 is no `key: value`. Write the colon"),
    "reserved": ("a: 1\nb: @x\n", "line 2 has a value that cannot stand alone"),
    "two documents": ("a: 1\n---\nb: 2\n", "line 1: expected a single document in the stream, line 2: but found"),
    "itself": ("a: &a [*a]\n", "line 1: it contains itself"),
    "itself, merged": ("a: &a {<<: *a}\n", "line 1: it contains itself"),
    "deep": ("a: " + "[" * 50_000, "not valid YAML: maximum recursion depth exceeded"),
    "long number": ("a: " + "9" * 5000, "not valid YAML: Exceeds the limit"),
    "no such day": ("a: 2024-13-45\n", "not valid YAML: month must be in 1..12. Correct it"),
    "no number": ("a: !!int abc\n", "not valid YAML"),
    "no truth": ("a: !!bool maybe\n", "not valid YAML"),
    "nothing": ("a: !!int ''\n", "not valid YAML"),
    "control": ("a: \x00\n", "not valid YAML: unacceptable character"),
    "no mapping": ("- a\n", "not a recipe. Write `key: value` lines"),
    "binary": (b"\xff\xfe\x00", "not UTF-8 text"),
    "another encoding": ("a: \u00e9\n".encode("latin-1"), "not UTF-8 text"),
}


@pytest.mark.parametrize("command", ["check", "run"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_recipe_that_is_not_plain_yaml_is_refused_in_one_sentence(tmp_path, monkeypatch, name, command):
    monkeypatch.chdir(tmp_path)
    content, message = REFUSED[name]
    Path("recipe.yml").write_bytes(content if isinstance(content, bytes) else content.encode())
    result = CliRunner().invoke(tvac, [command, "recipe.yml"])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.output.startswith("Error: recipe.yml: ")
    assert message in result.output
    assert "This is a fault of tvac-plugin" not in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yml"]


def test_a_folder_is_no_recipe(tmp_path):
    result = CliRunner().invoke(tvac, ["check", str(tmp_path)])
    assert result.exit_code == 1
    assert "cannot be read (Is a directory)" in result.output


@pytest.mark.parametrize("value", ["[", "!!python/name:os.system", "2024-13-45"])
def test_an_override_is_read_with_the_same_care(tmp_path, value):
    (tmp_path / "chain.yml").write_text("stages: [{name: align, train: align.yml}]\noutput_dir: out\n")
    (tmp_path / "align.yml").write_text("base_model: x\n")
    result = CliRunner().invoke(tvac, ["run", str(tmp_path / "chain.yml"), "--set", f"align.seed={value}"])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert "--set align.seed:" in result.output


def test_ordinary_yaml_reads_as_before():
    assert parse_document("a: &x {b: 1}\nc: *x\nd: {<<: *x, e: [1, two, 3.0, null, true]}\n") == {
        "a": {"b": 1}, "c": {"b": 1}, "d": {"b": 1, "e": [1, "two", 3.0, None, True]},
    }  # fmt: skip
    assert parse_document("a: &x {b: 1}\nc: {<<: *x, b: 2}\nd: {<<: *x, <<: {e: 3}}\n") == {
        "a": {"b": 1}, "c": {"b": 2}, "d": {"b": 1, "e": 3},
    }  # fmt: skip
    assert parse_document("\ufeffa: 1\n") == {"a": 1}
    assert parse_document("") is None
