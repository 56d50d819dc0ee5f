"""The docs site builds without a warning, and its search knows the words that users look for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    return folder


@pytest.mark.parametrize("word", ["idle", "QLoRA", "resume", "SafetyDefenseSFTTrainer", "--draws-from"])
def test_the_search_finds(site, word):
    pages = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    assert [page["location"] for page in pages if word in page["title"] + page["text"]]


def test_nothing_is_fetched_from_elsewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text()
        for tag in ('<script src="http', '<link rel="stylesheet" href="http', '<img src="http'):
            assert tag not in text, page


PAGES = sorted(path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_a_numbered_list_does_not_begin_again_after_a_block_of_code(site, page):
    prose = re.sub(r"^( *)```.*?^\1```$", "", (ROOT / "docs" / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    folder = page.parent if page.stem == "index" else page.with_suffix("")
    html = (site / folder / "index.html").read_text()
    assert html.count("<ol>") == len(re.findall(r"^1\. ", prose, flags=re.MULTILINE)), page
