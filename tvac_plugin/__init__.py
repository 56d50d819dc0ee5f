"""Defenses against harmful fine-tuning, one YAML line each, for Axolotl and TRL."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvac_plugin.args import TVaccineConfig as TVaccineConfig
    from tvac_plugin.args import VaccineConfig as VaccineConfig
    from tvac_plugin.plugin import SafetyDefensePlugin as SafetyDefensePlugin
    from tvac_plugin.trainers.sft import SafetyDefenseSFTTrainer as SafetyDefenseSFTTrainer

__version__ = "0.1.0"
__all__ = ["SafetyDefensePlugin", "SafetyDefenseSFTTrainer", "TVaccineConfig", "VaccineConfig"]

_HOMES = {
    "SafetyDefensePlugin": "tvac_plugin.plugin",
    "SafetyDefenseSFTTrainer": "tvac_plugin.trainers.sft",
    "TVaccineConfig": "tvac_plugin.args",
    "VaccineConfig": "tvac_plugin.args",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used.

    Raises:
        RuntimeError: Something it needs is not installed. Not an ImportError: Axolotl logs those of a plugin and goes
            on to train without it.
    """
    if name not in _HOMES:
        from tvac_plugin.args import did_you_mean

        raise AttributeError(f"tvac_plugin has no `{name}`.{did_you_mean(name, __all__)}")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except ImportError as error:
        raise RuntimeError(
            f"tvac_plugin.{name} cannot be loaded: {error}. Run `pip install 'tvac-plugin[axolotl]'`."
        ) from error
