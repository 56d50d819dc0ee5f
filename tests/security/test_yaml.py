"""YAML from strangers is data: it runs nothing, grows to nothing, and says nothing twice."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from tvac_plugin.cli import tvac
from tvac_plugin.documents import DocumentError, parse_document

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
MERGES = "m0: &m0 {x: 1}\n" + "".join(f"m{n}: &m{n}\n  <<: [{', '.join([f'*m{n - 1}'] * 9)}]\n" for n in range(1, 12))
LADDER = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 200))
HOSTILE = {
    "laughs": (LAUGHS, "values once its aliases are written out"),
    "merges": (MERGES, "values once its aliases are written out"),
    "ladder": (LADDER, "levels of lists and mappings"),
    "itself": ("a: &a [*a]\n", "line 1: contains itself"),
    "deep": ("a: " + "[" * 50_000, "levels of lists and mappings"),
    "many": ("a: [" + "1," * 120_000 + "]", "has more than 20000 values"),
    "large": ("a: " + "x" * 600_000, "larger than 256 kB, so it is no recipe"),
    "code": (
        "a: 1\nb: !!python/object/apply:os.system ['touch pwned']\n",
        "python/object/apply:os.system is not plain",
    ),
    "name": ("b: !!python/name:os.system\n", "python/name:os.system is not plain data and could run code"),
    "own tag": ("b: !include secrets.yml\n", "!include is not plain data"),
    "long number": ("a: " + "9" * 5000, "line 1: is a number of more than 300 digits"),
    "no such day": ("a: 2024-13-45\n", "not valid YAML"),
    "no number": ("a: !!int abc\n", "not valid YAML"),
    "no truth": ("a: !!bool maybe\n", "not valid YAML"),
    "no time": ("a: !!timestamp soon\n", "not valid YAML"),
    "control": ("a: \x00\n", "not valid YAML"),
    "twice": ("safety_defense: t_vaccine\nseed: 1\nsafety_defense: none\n", "line 3: `safety_defense:` is given twice"),
}


@pytest.mark.parametrize("command", ["check", "run"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_recipe_is_refused_at_once_in_one_sentence(tmp_path, monkeypatch, name, command):
    monkeypatch.chdir(tmp_path)
    text, message = HOSTILE[name]
    Path("recipe.yml").write_text(text)
    started = time.monotonic()
    result = CliRunner().invoke(tvac, [command, "recipe.yml"])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), result.exception
    assert message in result.output
    assert len(result.output) < 2000
    assert time.monotonic() - started < 20
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yml"]


def test_an_endless_file_and_a_binary_one_are_refused(tmp_path):
    for path, message in ((Path("/dev/zero"), "larger than"), (tmp_path / "b", "not UTF-8 text"), (tmp_path, "cannot")):
        if path.name == "b":
            path.write_bytes(b"\xff\xfe\x00")
        result = CliRunner().invoke(tvac, ["check", str(path)])
        assert result.exit_code == 1
        assert message in result.output


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
    assert parse_document("") is None
    with pytest.raises(DocumentError, match="not valid YAML"):
        parse_document("a: 1\n---\nb: 2\n")
