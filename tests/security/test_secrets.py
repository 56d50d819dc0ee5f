"""Passwords in a recipe reach the job that needs them, and nothing that is read by others."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from tests.chain.conftest import ALIGN, chain  # noqa: F401 (a fixture)
from tests.chain.fake import run
from tvac_plugin.boundary.errors import explain
from tvac_plugin.boundary.secrets import LEFT_OUT, has_secrets, is_secret, without_secrets
from tvac_plugin.cli import tvac

MARK = "zubrelqua-4711"
SECRETS = {"comet_api_key": MARK, "hub_token": MARK, "tracker": {"password": MARK, "host": "there"}}


def files_with_mark(folder):
    """Files that hold the mark; not weights, into which the stand-in for `axolotl` writes its whole recipe."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors")
    return {str(path.relative_to(folder)) for path in files if MARK.encode() in path.read_bytes()}


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(
    "key",
    ["comet_api_key", "hub_token", "hf_token", "token", "AWS_SECRET_ACCESS_KEY", "client_secret", "password", "apikey",
     "align.hub_token", "azure.credentials", "private_key", "ssh_key", "api_keys", "pwd", "Authorization",
     "datasets.storage_options.key"],
)  # fmt: skip
def test_a_secret_is_known_by_its_name(key):
    assert is_secret(key)


@pytest.mark.parametrize("key", ["hub_token", "api_keys", "pwd"])
def test_a_secret_is_left_out_wherever_it_is(key):
    assert without_secrets({"a": [{key: MARK}]}) == {"a": [{key: LEFT_OUT}]}


def test_secrets_below_a_key_and_in_an_address_are_left_out():
    recipe = {
        "datasets": [{"path": f"https://me:{MARK}@host/rows.jsonl", "storage_options": {"key": MARK, "anon": False}}],
        "key": "of a list", "special_tokens": {"pad_token": "<pad>"}, "url": "https://host/path?a=b@c",
    }  # fmt: skip
    shown = without_secrets(recipe)
    assert MARK not in str(shown)
    assert has_secrets(recipe)
    assert shown["datasets"][0]["path"] == f"https://{LEFT_OUT}@host/rows.jsonl"
    assert {key: shown[key] for key in ("key", "special_tokens", "url")} == {
        key: recipe[key] for key in ("key", "special_tokens", "url")
    }
    assert not has_secrets({key: recipe[key] for key in ("key", "special_tokens", "url")})


@pytest.mark.parametrize(
    ("key", "value"),
    [("eos_token", "</s>"), ("pad_token", "<pad>"), ("hf_use_auth_token", True), ("hub_token", None),
     ("eot_tokens", ["x"]), ("max_new_tokens", 4), ("tokenizer_type", "x"), ("embed_method", "last_token"),
     ("password", "")],
)  # fmt: skip
def test_what_only_sounds_like_one_stays(key, value):
    assert without_secrets({"b": {key: value}}) == {"b": {key: value}}
    assert not has_secrets({"b": [{key: value}]})


@pytest.mark.parametrize("where", ["align", "attack"])
def test_a_chain_keeps_them_in_the_recipes_of_the_jobs_that_need_them(chain, tmp_path, where):  # noqa: F811
    from tvac_plugin.report.pages import write_report

    path = chain(**{where: SECRETS})
    results = run(path)
    assert all(cell["status"] == "finished" for cell in results["cells"])
    write_report(tmp_path / "out")
    jobs = {job for job in results["jobs"] if results["jobs"][job]["kind"] == "train" and job.startswith(where)}
    folder = tmp_path / "out"
    assert files_with_mark(folder) == {f"jobs/{job}/recipe.yml" for job in jobs}
    assert json.loads((folder / "results.json").read_text())["jobs"][min(jobs)]["recipe"]["hub_token"] == LEFT_OUT
    for job in jobs:
        assert yaml.safe_load((folder / "jobs" / job / "recipe.yml").read_text())["hub_token"] == MARK
        assert mode(folder / "jobs" / job / "recipe.yml") == 0o600
        assert mode(folder / "jobs" / job) == 0o700
    merged = next(folder.glob("jobs/align*.merged/recipe.yml"))
    assert MARK not in merged.read_text()


def test_a_changed_password_trains_nothing_again(chain, tmp_path):  # noqa: F811
    lines = []
    run(chain(align={"hub_token": "one"}))
    run(chain(align={"hub_token": "two"}), say=lines.append)
    assert len(lines) == sum("already done" in line for line in lines)
    run(chain(align={"hub_token": "two", "seed": 5}), say=lines.append)
    assert any("axolotl" in line or "fake.py" in line for line in lines)


def test_a_dry_run_writes_no_readable_secret_either(chain, tmp_path):  # noqa: F811
    path = chain(align=ALIGN | SECRETS | {"base_model": str(tmp_path)})
    recipe = tmp_path / "out" / "jobs" / "align-safety_defense=none" / "recipe.yml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text("left by an older version, for all to read")
    result = CliRunner().invoke(tvac, ["run", str(path), "--dry-run"])
    assert MARK not in result.output
    assert MARK in recipe.read_text(), result.output
    assert {mode(Path(tmp_path / "out" / name)) for name in files_with_mark(tmp_path / "out")} == {0o600}


@pytest.mark.parametrize(
    "changes", [{"matrix": {"align.hub_token": [MARK]}}, {"arms": [{"align.comet_api_key": MARK}]}]
)
def test_no_folder_is_called_after_one(chain, tmp_path, changes):  # noqa: F811
    result = CliRunner().invoke(tvac, ["run", str(chain(**changes))])
    assert result.exit_code == 1
    assert "is a secret, and folders are called after it. Remove it" in result.output
    assert MARK not in result.output
    assert not (tmp_path / "out").exists()


def test_a_refused_value_is_not_repeated():
    from pydantic import BaseModel, ValidationError

    class Tracker(BaseModel):
        api_token: int

    with pytest.raises(ValidationError) as caught:
        Tracker(api_token=MARK)
    assert MARK not in "".join(explain(caught.value))


def test_axolotl_leaves_none_in_a_run_s_output(workspace, tmp_path, monkeypatch, heard):
    from tests.support.workspace import axolotl_train

    monkeypatch.setenv("COMET_API_KEY", "")
    output = tmp_path / "out"
    axolotl_train(workspace.recipe(output, use_comet=False, **SECRETS))
    assert (output / "safety_defense.json").is_file()
    assert files_with_mark(tmp_path) == set()
    assert LEFT_OUT in (output / "README.md").read_text()
    assert os.environ["COMET_API_KEY"] == MARK
    assert any("config:" in line for line in heard)
    assert MARK not in "".join(heard)
