"""Writes the reference pages that are made from the code: `python docs/generate.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tvac_plugin.args import DEFENSE_CONFIGS, SafetyDefenseArgs, SimulatedUserConfig
from tvac_plugin.chain.recipe import ChainRecipe, LoxConfig, Stage
from tvac_plugin.compat import REFUSALS, SUPPORT
from tvac_plugin.evaluation.judges import JUDGES
from tvac_plugin.evaluation.recipe import Accuracy, EvaluateRecipe, Judged, PromptSource

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "docs" / "reference"


def settings_page() -> str:
    """All recipe keys with type, bounds and description."""
    parts = [
        "# Recipe keys\n\nWhat the plugin adds to an Axolotl recipe. Unknown keys inside a block, and keys that look "
        "like one of these, are refused by "
        "`axolotl train` and `axolotl tvac check`. `axolotl tvac schema --output schema.json` writes them as JSON "
        "Schema.\n"
        "This page is written by `make docs`.\n",
        _table(SafetyDefenseArgs.model_json_schema()["properties"], skip=DEFENSE_CONFIGS),
    ]
    blocks = {**DEFENSE_CONFIGS, "simulated_user": SimulatedUserConfig}
    parts += [_block(f"`{name}:`", config) for name, config in blocks.items()]
    return "\n".join(parts)


def chains_page() -> str:
    """All keys of evaluations and chains, and the judges."""
    blocks = {
        "Evaluation (`axolotl tvac evaluate`)": EvaluateRecipe,
        "`harmful_score:` and `over_refusal:`": Judged,
        "Entries of `accuracy:`": Accuracy,
        "`prompts:`": PromptSource,
        "Chain (`axolotl tvac run`)": ChainRecipe,
        "Entries of `stages:`": Stage,
        "`lox:` of a stage": LoxConfig,
    }
    judges = "\n".join(
        f"| `{name}` | {entry.weights or ''} | {entry.threshold or ''} | {entry.note} |"
        for name, entry in JUDGES.items()
    )
    return "\n".join([
        "# Keys of evaluations and chains\n\nUnknown keys are refused.\nThis page is written by `make docs`.",
        *(_block(title, block) for title, block in blocks.items()),
        f"\n## Judges\n\n| judge | weights | threshold | note |\n|---|---|---|---|\n{judges}\n",
    ])  # fmt: skip


def _block(title: str, block: Any) -> str:
    return f"\n## {title}\n\n{block.__doc__}\n\n{_table(block.model_json_schema()['properties'])}"


def refusals_page() -> str:
    """The table of refused combinations."""
    rows = "\n".join(f"| `{refusal.key}` | {refusal.reason} |" for refusal in REFUSALS)
    return (
        "# Refused combinations\n\nSettings of Axolotl that no defense can be combined with. `axolotl train` and "
        "`axolotl tvac check` refuse them before\nanything is loaded, all in one message. With `safety_defense: none`, "
        "or without the key, nothing is refused.\nThis page is written by `make docs`.\n\n"
        f"| key | why, and what to do |\n|---|---|\n{rows}\n"
    )


def families_page() -> str:
    """The families of models that the tests go through, and those that are refused."""
    sys.path.insert(0, str(ROOT))
    from tests.families import FAMILIES, REFUSED

    rows = "\n".join(
        f"| {family.title} | `{name}` | {_classes(family.attention)} | {_classes(family.mlp)} | {family.note} |"
        for name, family in FAMILIES.items()
    )
    refused = "\n".join(f"| {entry.title} | `{name}` | {entry.why} |" for name, entry in REFUSED.items())
    return (
        "# Families of models\n\nThe layers of a model are found by structure, so a family that is missing here may "
        f"work. These {len(FAMILIES)} are tested with\ntiny random weights: a perturbation lands at its layer with its "
        "length, one training step changes the drawn layers and no\nothers, with LoRA and with full fine-tuning, and "
        "activation checkpointing changes no gradient. Of a multimodal model "
        "the\nlanguage model is defended. This page is written by `make docs`.\n\n"
        f"| models | model type | `perturb: attention` | `perturb: mlp` | note |\n|---|---|---|---|---|\n{rows}\n\n"
        "## Refused\n\nThe error names the architecture and the layers.\n\n"
        f"| models | model type | why |\n|---|---|---|\n{refused}\n"
    )


def _classes(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def support_page() -> str:
    """What was tried, what was not, and what is refused."""
    rows = "\n".join(
        f"| {row.area} | {row.feature} | {row.status} | {row.note} | {row.shown_by and f'`{row.shown_by}`'} |"
        for row in SUPPORT
    )
    return (
        "# Support matrix\n\nWhat a defense can be trained with. `supported` is shown by the test named, `untested` "
        "has not been tried, `refused` stops\nthe run before the first step. Recipe keys that are refused are in "
        "[their own table](refused-combinations.md),\nmodel families in [theirs](model-families.md).\n"
        "This page is written by `make docs`.\n\n"
        f"| area | feature | status | limits, or why not | shown by |\n|---|---|---|---|---|\n{rows}\n"
    )


def _table(properties: dict[str, Any], *, skip: Any = ()) -> str:
    rows = [
        f"| `{name}` | {_kind(schema)} | {schema['description']} |"
        for name, schema in properties.items()
        if name not in skip
    ]
    return "| key | type | meaning |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def _kind(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        schema = next(option for option in schema["anyOf"] if option != {"type": "null"})
    if "$ref" in schema:
        return "block"
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    bounds = [f"{schema[key]:,}" for key in ("minimum", "maximum") if key in schema]
    return f"{schema.get('type', 'block')} {' to '.join(bounds)}".strip()


if __name__ == "__main__":
    (REFERENCE / "settings.md").write_text(settings_page(), encoding="utf-8")
    (REFERENCE / "chains.md").write_text(chains_page(), encoding="utf-8")
    (REFERENCE / "refused-combinations.md").write_text(refusals_page(), encoding="utf-8")
    (REFERENCE / "model-families.md").write_text(families_page(), encoding="utf-8")
    (REFERENCE / "support-matrix.md").write_text(support_page(), encoding="utf-8")
