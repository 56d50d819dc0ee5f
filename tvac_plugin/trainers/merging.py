"""Merging a defended adapter into its base model, with a manifest of its own."""

from __future__ import annotations

from pathlib import Path

from axolotl.cli.config import load_cfg
from axolotl.cli.merge_lora import do_cli

from tvac_plugin.provenance.manifest import verify
from tvac_plugin.provenance.merged import seal_merged


def merge_adapter(recipe: Path, adapter: Path | None) -> Path:
    """Merges an adapter as `axolotl merge-lora` does, and gives the merged model its proof on every version of Axolotl.

    Args:
        recipe: What it was trained with.
        adapter: Its folder; by default the recipe's `output_dir`.

    Returns:
        The merged model's folder.

    Raises:
        UserError: The adapter is not shown to be defended, or merging changed nothing.
    """
    cfg = load_cfg(str(recipe))
    adapter, merged = adapter or Path(cfg.output_dir), Path(cfg.output_dir) / "merged"
    verify(adapter)
    do_cli(str(recipe), lora_model_dir=str(adapter))
    seal_merged(adapter, merged, method=cfg.merge_method or "memory_efficient")
    return merged
