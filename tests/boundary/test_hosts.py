"""What each host does is told by what is installed, not by its version."""

from __future__ import annotations

import contextlib
from importlib.metadata import EntryPoint, version

import pytest

import tvac_plugin
from tvac_plugin.boundary import hosts

OURS = EntryPoint("tvac", "tvac_plugin:SafetyDefensePlugin", hosts.PLUGIN_GROUP)
AXOLOTLS = EntryPoint("x", "axolotl.integrations.expert_parallel:ExpertParallelPlugin", hosts.PLUGIN_GROUP)


@pytest.mark.parametrize(
    ("points", "loads"), [([OURS, AXOLOTLS], True), ([OURS], False), ([AXOLOTLS], False), ([], False)]
)
def test_an_installed_plugin_is_loaded_where_axolotl_has_plugins_of_its_own_there(points, loads, monkeypatch):
    monkeypatch.setattr(hosts, "entry_points", lambda group: points)
    assert hosts.loads_installed_plugins.__wrapped__() is loads


def test_this_host_is_told_right():
    assert hosts.loads_installed_plugins() is (tuple(map(int, version("axolotl").split(".")[:2])) >= (0, 21))


@pytest.mark.parametrize("error", [ImportError("no cryptography"), OSError("libtorch is damaged")])
def test_a_plugin_that_cannot_be_loaded_ends_axolotl_whoever_catches_what(error, monkeypatch):
    def broken(_name):
        raise error

    monkeypatch.setattr(tvac_plugin, "import_module", broken)
    with pytest.raises(SystemExit, match=f"SafetyDefensePlugin cannot be loaded: {error}. Run `pip .*or uninstall"):
        _swallowing_errors(lambda: tvac_plugin.SafetyDefensePlugin)


def _swallowing_errors(load):
    """Loads a plugin as Axolotl 0.21 does one that is there because it is installed."""
    with contextlib.suppress(Exception):
        load()


def test_a_trainer_that_cannot_be_loaded_is_an_ordinary_error(monkeypatch):
    def broken(_name):
        raise ImportError("no trl")

    monkeypatch.setattr(tvac_plugin, "import_module", broken)
    with pytest.raises(RuntimeError, match="SafetyDefenseSFTTrainer cannot be loaded: no trl. Run `pip install"):
        _ = tvac_plugin.SafetyDefenseSFTTrainer
