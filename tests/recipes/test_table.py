"""`recipes/README.md` lists every recipe, as its header describes it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tvac_plugin.recipes.reading import read_recipe

FOLDER = Path(__file__).parent.parent.parent / "recipes"
ROW = re.compile(r"^\| \[(?P<name>[\w/.]+\.yml)\]\((?P=name)\) \| (.+) \| (.+) \| (.+) \| (.+) \|$", re.MULTILINE)
OF_A_CHAIN = {
    "tiny world": r"_tiny\.yml$",
    "Llama-2-7B": r"_llama\.yml$|^papers/",
    "SmolLM2-135M-Instruct": r"^english/",
}
"""Names of the recipes that start from no model on the hub, by what the table calls their model."""
ROWS = [match.groups() for match in ROW.finditer((FOLDER / "README.md").read_text())]


def header_field(name, field):
    header = (FOLDER / name).read_text().split("\n\n")[0]
    text = re.search(rf"^# {field}:(.*?)(?=^# \w+:|\Z)", header, re.MULTILINE | re.DOTALL)[1]
    return " ".join(text.replace("\n#", "\n").split())


def test_every_recipe_is_in_the_table_once():
    files = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.yml"))
    assert sorted(name for name, *_ in ROWS) == files


@pytest.mark.parametrize(("name", "what", "model", "hardware", "time"), ROWS, ids=[row[0] for row in ROWS])
def test_a_row_says_what_the_recipe_says(name, what, model, hardware, time):
    assert header_field(name, "Hardware").startswith(hardware)
    assert time.lower() in header_field(name, "Time").lower()
    base_model = str(read_recipe(FOLDER / name).get("base_model", "outputs/"))
    if not base_model.startswith("outputs/"):
        assert base_model.lower().split("/")[1].startswith(model.lower())
    else:
        assert re.search(OF_A_CHAIN[model], name)
