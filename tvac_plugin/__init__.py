"""Defenses against harmful fine-tuning, one YAML line each, for Axolotl and TRL."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvac_plugin.configs.perturbation import TVaccineConfig as TVaccineConfig
    from tvac_plugin.configs.perturbation import VaccineConfig as VaccineConfig
    from tvac_plugin.plugin import SafetyDefensePlugin as SafetyDefensePlugin
    from tvac_plugin.trainers.sft import SafetyDefenseSFTTrainer as SafetyDefenseSFTTrainer

__version__ = "0.2.0"
__all__ = ["SafetyDefensePlugin", "SafetyDefenseSFTTrainer", "TVaccineConfig", "VaccineConfig"]

_HOMES = {
    "SafetyDefensePlugin": "tvac_plugin.plugin",
    "SafetyDefenseSFTTrainer": "tvac_plugin.trainers.sft",
    "TVaccineConfig": "tvac_plugin.configs.perturbation",
    "VaccineConfig": "tvac_plugin.configs.perturbation",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used.

    Raises:
        RuntimeError: Something it needs is not installed. Not an ImportError: Axolotl 0.19 and 0.20 log those of a
            plugin and go on to train without it.
        SystemExit: The same of the plugin: of one that is loaded because it is installed, 0.21 logs any other error.
    """
    if name not in _HOMES:
        from tvac_plugin.boundary.errors import did_you_mean

        raise AttributeError(f"tvac_plugin has no `{name}`.{did_you_mean(name, __all__)}")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except Exception as error:
        says = f"tvac_plugin.{name} cannot be loaded: {error}. Run `pip install 'tvac-plugin[axolotl]'`"
        if name == "SafetyDefensePlugin":
            raise SystemExit(f"{says}, or uninstall tvac-plugin.") from error
        if isinstance(error, ImportError):
            raise RuntimeError(f"{says}.") from error
        raise
