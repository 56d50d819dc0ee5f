"""The docs say what the code does."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

import tvac_plugin
from tests.support.support_matrix import SUPPORT
from tests.test_deceptions import WAYS
from tests.test_hosts import MISTAKES
from tvac_plugin.args import SafetyDefenseArgs
from tvac_plugin.chain.recipe import ChainRecipe
from tvac_plugin.cli import tvac
from tvac_plugin.configs import DEFENSE_CONFIGS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXT = "\n".join(page.read_text() for page in PAGES)


def generator():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("path", "page"), generator().PAGES.items(), ids=lambda item: getattr(item, "name", ""))
def test_generated_pages_are_current(path, page):
    assert path.read_text() == page(), "run `make docs`"


def test_every_way_to_be_fooled_is_in_the_docs_once_and_tried():
    page = (ROOT / "docs" / "explanation" / "how-you-could-be-fooled.md").read_text()
    rows = re.findall(r"^\| (.+?) \| .+ \|$", page, re.MULTILINE)
    shown = [row for row in rows if row not in ("way", "mistake")]
    tried = [way.what for ways in (*WAYS.values(), MISTAKES) for way in ways]
    assert shown == tried
    assert len(set(tried)) == len(tried)


def blocks():
    for page in PAGES:
        for number, block in enumerate(
            re.findall(r"^ *```yaml\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE)
        ):
            if "custom_defense" not in block and "gardeners." not in block:  # test_custom.py and test_own_judge.py do
                yield pytest.param(block, id=f"{page.name}-{number}")


@pytest.mark.parametrize("block", blocks())
def test_every_yaml_block_is_accepted_by_the_schema(block):
    recipe = yaml.safe_load(block)
    if "stages" in recipe:
        ChainRecipe.model_validate(recipe)
        return
    ours = {key: value for key, value in recipe.items() if key in SafetyDefenseArgs.model_fields}
    assert SafetyDefenseArgs.model_validate(ours).safety_defense
    assert recipe.keys() <= {"plugins", *SafetyDefenseArgs.model_fields}


def test_the_readme_s_table_is_a_chain_s():
    header = ["run", "model", "harmful score %", "over refusal %", "benign %", "task %"]
    assert "  ".join(header) in re.sub(r" {3,}", "  ", (ROOT / "README.md").read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("name", sorted(set(tvac.commands) - {"schema", "english-world"}))
def test_commands_in_the_docs_exist(name):
    assert f"axolotl tvac {name}" in TEXT
    assert name in tvac.commands


def test_public_names_and_metrics_are_documented():
    for name in tvac_plugin.__all__:
        if name != "VaccineConfig":
            assert name in TEXT, name
    source = (ROOT / "tvac_plugin" / "trainers" / "metrics.py").read_text()
    for name in DEFENSE_CONFIGS:
        code = (ROOT / "tvac_plugin" / "defenses" / f"{name}.py").read_text()
        for metric in re.findall(r'"(\w+_(?:loss|norm|after_step))":', code):
            assert f"`safety/{metric}`" in TEXT, metric
    for metric in set(re.findall(r'"(safety/\w+)"', source)) | {"safety/drawn_layer"}:
        assert f"`{metric}" in TEXT, metric


def test_a_misspelt_public_name_is_answered_with_the_right_one():
    with pytest.raises(AttributeError, match=r"Did you mean `SafetyDefensePlugin`\?"):
        tvac_plugin.SafetyDefencePlugin  # noqa: B018


@pytest.mark.parametrize("row", SUPPORT, ids=lambda row: row.feature)
def test_the_support_matrix_names_tests_that_exist(row):
    assert row.shown_by or row.status == "untested"
    if row.shown_by:
        file, function = row.shown_by.split("::")
        assert f"def {function}(" in (ROOT / file).read_text()
