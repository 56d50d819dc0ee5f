"""What a user causes is one sentence; what nobody causes is called our fault; `--debug` shows where."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner
from pydantic import BaseModel, ValidationError

from tvac_plugin.boundary.errors import UserError, did_you_mean, sentence_of
from tvac_plugin.cli import tvac


class Settings(BaseModel):
    steps: int


def invalid():
    try:
        Settings.model_validate({"steps": "many"})
    except ValidationError as error:
        return error


ERRORS = {
    "user": (UserError("recipe.yml: not a recipe. Write one."), "Error: recipe.yml: not a recipe. Write one.\n"),
    "schema": (invalid(), "Error: steps: Input should be a valid integer"),
    "system": (PermissionError(13, "Permission denied", "out"), "Permission denied: 'out'. Fix that and run the same"),
    "ours": (KeyError("x"), "KeyError: 'x'\nThis is a fault of tvac-plugin, not yours."),
    "escapes": (UserError("\x1b[2Jgone"), "Error: \N{REPLACEMENT CHARACTER}[2Jgone"),
}


@pytest.fixture(params=ERRORS)
def failing(request, monkeypatch):
    error, said = ERRORS[request.param]

    @click.command()
    def fail():
        raise error

    monkeypatch.setitem(tvac.commands, "fail", fail)
    return error, said


def test_errors_of_commands_are_sentences(failing):
    _, said = failing
    result = CliRunner().invoke(tvac, ["fail"])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert said in result.output


def test_debug_keeps_the_traceback(failing):
    error, _ = failing
    result = CliRunner().invoke(tvac, ["--debug", "fail"])
    assert result.exception is error


def test_no_command_makes_sentences_of_its_own():
    """`ClickException` is raised in one place, so that every command's errors come out alike."""
    from pathlib import Path

    package = Path(tvac.callback.__code__.co_filename).parent
    users = [path.name for path in package.rglob("*.py") if "ClickException(" in path.read_text(encoding="utf-8")]
    assert users == ["cli.py"]


def test_text_that_is_no_yaml_is_refused_by_its_option():
    result = CliRunner().invoke(tvac, ["bench", "--set", "t_vaccine.rho=["])
    assert result.exit_code == 1
    assert "--set t_vaccine.rho=[: not valid YAML" in result.output


@pytest.mark.parametrize("size", ["9" * 400 + "GB", "-1GB", "1e9GB", "GB"])
def test_sizes_that_are_none_are_refused(size):
    recipe = "recipes/tvaccine_llama.yml"
    result = CliRunner().invoke(
        tvac, ["plan", recipe, "--model-config", "recipes/shapes/llama_2_7b.json", "--gpu", size]
    )
    assert result.exit_code == 1 or result.exit_code == 2
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)


def test_a_word_is_answered_with_the_nearest_option():
    assert did_you_mean("t_vacine", ["t_vaccine", "tar"]) == " Did you mean `t_vaccine`?"
    assert did_you_mean("zzz", ["a", "b"]) == " Use one of: a, b."
    assert "far" in sentence_of(UserError("far"))
