"""A running job says how far it is."""

from __future__ import annotations

import io

import pytest
from tqdm import tqdm

from tests.chain import fake
from tvac_plugin.chain.progress import progress


def bar(done, total, description=""):
    """What tqdm writes to a log that is no terminal."""
    return tqdm.format_meter(done, total, elapsed=14.0, prefix=description)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("loading\n", None),
        (bar(0, 600), "0 of 600"),
        (f"{bar(120, 600)}\r{bar(240, 600)}", "240 of 600, 00:21 left"),
        (f"{{'loss': '2.5'}}\n{{'loss': '0.3119'}}\n{bar(240, 600)}", "240 of 600, loss 0.312, 00:21 left"),
        (f"{{'loss': 0.3}}\n{bar(1, 4, 'answers of base')}", "answers of base: 1 of 4, loss 0.3, 00:42 left"),
    ],
)
def test_the_last_bar_counts(tmp_path, text, expected):
    (tmp_path / "log.txt").write_text(text)
    assert progress(tmp_path / "log.txt") == expected


def test_a_log_that_is_not_there_yet_says_nothing(tmp_path):
    assert progress(tmp_path / "log.txt") is None


def test_a_long_log_is_read_at_its_end(tmp_path):
    (tmp_path / "log.txt").write_text(f"{bar(1, 600)}\n" + "x" * 100_000 + f"\n{bar(300, 600)}")
    assert progress(tmp_path / "log.txt").startswith("300 of 600")


def test_a_chain_tells_it(chain, monkeypatch):
    monkeypatch.setattr("tvac_plugin.chain.runner._TELL_SECONDS", 0.0)
    monkeypatch.setattr("tvac_plugin.chain.runner.progress", lambda log: f"3 of 4 in {log.name}")
    lines = io.StringIO()
    fake.run(chain(), say=lambda line: lines.write(line + "\n"))
    assert ": 3 of 4 in log.txt\n" in lines.getvalue()
