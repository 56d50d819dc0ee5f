"""What is said of a job's process is in the unit that it says."""

from __future__ import annotations

import resource
import sys

import pytest

from tvac_plugin.chain.process import peak_memory_mb


@pytest.mark.parametrize(("platform", "max_rss"), [("linux", 300 * 2**10), ("darwin", 300 * 2**20)])
def test_peak_memory_is_in_mb_on_every_system(platform, max_rss):
    assert peak_memory_mb(max_rss, platform=platform) == 300.0


def test_this_process_s_own_peak_is_of_the_right_size():
    max_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert 10 < peak_memory_mb(max_rss) < 100_000, sys.platform
