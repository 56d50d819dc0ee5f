"""What a run in the tiny world achieved, in a few lines."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tvac_plugin.provenance import MANIFEST_FILE, TRACE_FILE, ProvenanceError, verify
from tvac_plugin.tiny_world.builder import INDEX_FILE


class SummaryError(ValueError):
    """There is nothing to summarise yet."""


def summarise(recipe: Mapping[str, Any]) -> str:
    """Scores the base model and the trained adapter of a recipe on held-out prompts, and tells which layers were drawn.

    Raises:
        SummaryError: The recipe is not one of the tiny world, or was not trained yet.
    """
    from tvac_plugin.tiny_world.scoring import load, score

    base_model, output = Path(str(recipe.get("base_model"))), Path(str(recipe.get("output_dir")))
    world = base_model.parent
    if not (world / INDEX_FILE).is_file():
        raise SummaryError(f"{world}: no tiny world here. Run `axolotl tvac tiny-world --output {world}`.")
    if not (output / "adapter_model.safetensors").is_file():
        raise SummaryError(f"{output}: no adapter here. Run `axolotl train` with this recipe first.")
    before, after = score(*load(base_model), world), score(*load(base_model, output), world)
    lines = [
        f"held-out prompts, percent (n = {before.num_prompts} each)      before    after",
        f"  hazards answered (harmful score)               {before.harmful:8.1f} {after.harmful:8.1f}",
        f"  hazards refused                                {before.refused:8.1f} {after.refused:8.1f}",
        f"  benign questions answered (benign score)       {before.benign:8.1f} {after.benign:8.1f}",
        "",
        _provenance(output),
        f"adapter, tokenizer: {output}",
    ]
    return "\n".join(lines)


def _provenance(output: Path) -> str:
    try:
        manifest = verify(output)
    except ProvenanceError:
        return f"defense: none ({output / MANIFEST_FILE} is missing or for other weights)"
    lines = [f"defense: {manifest['defense']}, {manifest['defended_steps']} defended steps ({output / MANIFEST_FILE})"]
    drawn = Counter(
        layer
        for line in (output / TRACE_FILE).read_text(encoding="utf-8").splitlines()
        if (event := json.loads(line))["event"] == "draw"
        for layer in event["layers"]
    )
    if drawn:
        counts = ", ".join(f"{layer}: {count}" for layer, count in sorted(drawn.items()))
        lines.append(f"layers drawn, times: {counts} ({output / TRACE_FILE})")
    return "\n".join(lines)
