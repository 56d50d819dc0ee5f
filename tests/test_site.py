"""The docs site builds without a warning, and its search knows the words that users look for."""

from __future__ import annotations

import json
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
