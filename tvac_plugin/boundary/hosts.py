"""How the versions of Axolotl and TRL differ in what matters here, told by what is there and not by a number."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

PLUGIN_GROUP = "axolotl.plugins"
"""Plugins that Axolotl loads because they are installed, from 0.21 on."""


@cache
def loads_installed_plugins() -> bool:
    """Whether Axolotl loads this plugin without a line in `plugins:`.

    From 0.21 on it does, brings plugins of its own that way, and stops at one that is named and cannot be loaded.
    Before it trains on without it.
    """
    loaded = {point.value.partition(":")[0].partition(".")[0] for point in entry_points(group=PLUGIN_GROUP)}
    return {"axolotl", "tvac_plugin"} <= loaded


@cache
def sft_trainer_leaves_prompts_out() -> bool:
    """Whether `SFTTrainer` projects answer tokens alone, from hidden states of its own, as it does from TRL 1.16 on.

    Its loss then comes past the model's head and loss, so nothing there can be replaced.
    """
    from trl.trainer import sft_trainer

    return hasattr(sft_trainer, "add_fused_lm_head")
