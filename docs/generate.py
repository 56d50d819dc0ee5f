"""Writes the reference pages that are made from the code: `python docs/generate.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from tvac_plugin.args import SafetyDefenseArgs
from tvac_plugin.chain.recipe import ChainRecipe, LoxConfig, Stage
from tvac_plugin.chain.space import Attacker, Search
from tvac_plugin.cli import tvac
from tvac_plugin.configs import DEFENSE_CONFIGS
from tvac_plugin.configs.refusals import REFUSALS
from tvac_plugin.configs.simulated_user import SimulatedUserConfig
from tvac_plugin.evaluation.judges import JUDGES
from tvac_plugin.evaluation.protocols import PROTOCOLS
from tvac_plugin.evaluation.recipe import Accuracy, EvaluateRecipe, Judged, PromptSource, Retention

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "docs" / "reference"
EXPLANATION = ROOT / "docs" / "explanation"
sys.path.insert(0, str(ROOT))  # tables that the tests are held to stand beside the tests


def settings_page() -> str:
    """All recipe keys with type, bounds and description."""
    parts = [
        "# Recipe keys\n\nThe keys that the plugin adds to an Axolotl recipe. `axolotl train` and `axolotl tvac check` "
        "refuse unknown keys inside a block,\nand keys that look like one of these. `axolotl tvac schema --output "
        "schema.json` writes them as JSON Schema.\nThis page is written by `make docs`.\n",
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
        "`retention:`": Retention,
        "`prompts:`": PromptSource,
        "Chain (`axolotl tvac run`)": ChainRecipe,
        "Entries of `stages:`": Stage,
        "`lox:` of a stage": LoxConfig,
        "`search:` of a chain": Search,
        "`attacker:` of a chain": Attacker,
    }
    judges = "\n".join(
        f"| `{name}` | {entry.weights or ''} | {entry.threshold or ''} | {entry.note} |"
        for name, entry in JUDGES.items()
    )
    return "\n".join([
        "# Keys of evaluations and chains\n\nUnknown keys are refused.\nThis page is written by `make docs`.",
        *(_block(title, block) for title, block in blocks.items()),
        f"\n## Protocols\n\nWhat `protocol:` sets.\n\n{_protocols()}",
        f"\n## Judges\n\n| judge | weights | threshold | note |\n|---|---|---|---|\n{judges}\n",
    ])  # fmt: skip


def _protocols() -> str:
    rows = "\n".join(
        f"| `{name}` | {'all' if entry.only is None else 'unsafe'}, the first {entry.num_prompts:,} | "
        f"{entry.max_new_tokens} | {entry.limit:,} | {entry.source} |"
        for name, entry in PROTOCOLS.items()
    )
    return (
        "| `protocol:` | rows of BeaverTails' `30k_test` | tokens of an answer | items of a task | read in |\n"
        f"|---|---|---|---|---|\n{rows}\n"
    )


def _block(title: str, block: Any) -> str:
    return f"\n## {title}\n\n{block.__doc__}\n\n{_table(block.model_json_schema()['properties'])}"


def commands_page() -> str:
    """Every `axolotl tvac` command with its arguments and options."""
    parts = [
        "# Commands\n\nAll of them are `axolotl tvac COMMAND`, or `tvac COMMAND`, which starts faster. With `--debug` "
        "before the command an error\nkeeps its traceback. An error ends with exit code 1, a wrong command line with "
        "2. This page is written by `make docs`."
    ]
    for name, command in sorted(tvac.commands.items()):
        usage = " ".join(["axolotl tvac", name, *command.collect_usage_pieces(click.Context(command))])
        parts.append(f"## {name}\n\n{command.help}\n\n```text\n{usage}\n```\n{_options(command)}".strip())
    return "\n\n".join(parts) + "\n"


def _options(command: click.Command) -> str:
    options = [option for option in command.params if isinstance(option, click.Option)]
    records = filter(None, (option.get_help_record(click.Context(command)) for option in options))
    rows = "\n".join(f"| `{_cell(flags)}` | {_cell(text)} |" for flags, text in records)
    return f"\n| option | meaning |\n|---|---|\n{rows}" if rows else ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def refusals_page() -> str:
    """The table of refused combinations."""
    rows = "\n".join(f"| `{refusal.key}` | {refusal.reason} |" for refusal in REFUSALS)
    return (
        "# Refused combinations\n\nThese settings of Axolotl cannot be combined with any defense. `axolotl train` and "
        "`axolotl tvac check` refuse them before\nanything is loaded, all in one message. With `safety_defense: none`, "
        "or without the key, nothing is refused.\nThis page is written by `make docs`.\n\n"
        f"| key | why, and what to do |\n|---|---|\n{rows}\n"
    )


def families_page() -> str:
    """The families of models that the tests go through, and those that are refused."""
    from tests.support.families import FAMILIES, REFUSED

    rows = "\n".join(
        f"| {family.title} | `{name}` | {_classes(family.attention)} | {_classes(family.mlp)} | {family.note} |"
        for name, family in FAMILIES.items()
    )
    refused = "\n".join(f"| {entry.title} | `{name}` | {entry.why} |" for name, entry in REFUSED.items())
    return (
        "# Model families\n\nThe layers of a model are found by structure, so a family that is not listed may still "
        f"work. Tests with tiny random\nweights show for each of these {len(FAMILIES)} that a perturbation reaches its "
        "layer with its full norm, that one training step\nchanges the drawn layers and no others, with LoRA and with "
        "full fine-tuning, and that activation checkpointing changes no\ngradient. In a multimodal model, the language "
        "model is defended. This page is written by `make docs`.\n\n"
        f"| models | model type | `perturb: attention` | `perturb: mlp` | note |\n|---|---|---|---|---|\n{rows}\n\n"
        "## Refused\n\nThe error names the architecture and the layers.\n\n"
        f"| models | model type | why |\n|---|---|---|\n{refused}\n"
    )


def fooled_page() -> str:
    """The ways to be fooled that the tests try, and what no test can try."""
    from tests.test_deceptions import WAYS
    from tests.test_hosts import MISTAKES

    caught = {
        "check": "Before training: `axolotl tvac check` refuses the recipe",
        "train": "At the start of training: it is refused before the first step",
        "no manifest": "At the end of training: no manifest is written, so `axolotl tvac verify` refuses the model",
        "verify": "Afterwards: `axolotl tvac verify` refuses the folder",
        "stale": "When data or models were changed: what was made from them is made again",
    }
    tables = "\n".join(
        f"## {title}\n\n| way | the message says |\n|---|---|\n"
        + "".join(f"| {way.what} | {_words(way.says) or 'that there is no manifest'} |\n" for way in WAYS[name])
        for name, title in caught.items()
    )
    mistakes = "".join(f"| {mistake.what} | {mistake.older} | {mistake.newer} |\n" for mistake in MISTAKES)
    return (
        "# How you could be fooled, and what catches it\n\nA model is called defended when `axolotl tvac verify` "
        f"accepts its folder. Each of the {sum(map(len, WAYS.values()))} ways below ends with a\nmodel that is not "
        "defended, or not shown to be, and could be believed to be. `tests/test_deceptions.py` tries them all, and\n"
        "`tests/test_sealed_or_not.py` tries random settings of every defense. This page is written by `make docs`.\n\n"
        "Check the recipe before training. Verify the folder that you hand on, after the last change to it.\n\n"
        f"{tables}\n{_HOSTS}{mistakes}\n{_NOT_KNOWN}"
    )


_HOSTS = """## Without a check: what `axolotl train` does with a plugin that is wrong

Axolotl loads a plugin that a recipe names, and from 0.21 on one that is installed. `axolotl tvac check` refuses all of
these, but for those that train with the defense. `tests/test_hosts.py` tries them. A plugin that is there and cannot be
loaded ends every version. One that is not installed is a misspelt one if the recipe names it; else no version notices,
and only `verify` does.

| mistake | Axolotl 0.19, 0.20 | Axolotl 0.21 |
|---|---|---|
"""
_NOT_KNOWN = """## What cannot be known

- Whoever can write to the folder can write a manifest too, with hashes that match. A manifest reveals mistakes, not
  malice, unless it is [signed](../how-to/defend-your-recipe.md#prove-it-to-others) and you know the owner of the key.
- The effect of the defense on training is measured, not the safety of the model. A defense that worked in every step
  may still not be enough: `axolotl tvac evaluate` measures what the model answers.
- What counts is that the defense changed its training, not by how much. A strength just above the least that is
  accepted gets a manifest, and so does a defense that acts in few of all steps. Read the settings in the manifest and
  the steps that `verify` prints.
- A defense of your own is taken at its word about its norms. Other code in the same process can undo what it does.
- Weight decay moves weights as well. A recipe that leaves it as the only thing that trains is refused; TRL's arguments
  are not checked for this.
- A base model that is not on this machine cannot be compared; `verify` says so.
- Whoever loads the model decides the rest: the prompt, the system message, the sampling, more adapters, more training.
"""


def _words(pattern: str) -> str:
    """A regular expression as words in a cell of a table."""
    return pattern.replace(".*", "...").replace("|", "\\|").strip()


def _classes(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def support_page() -> str:
    """What was tried, what was not, and what is refused."""
    from tests.support.support_matrix import HOSTS, SUPPORT

    rows = "\n".join(
        f"| {row.area} | {row.feature} | {row.status} | {row.note} | {row.shown_by and f'`{row.shown_by}`'} |"
        for row in SUPPORT
    )
    hosts = "\n".join(f"| {run.host} | {run.tried} | {run.failed} |" for run in HOSTS)
    return (
        "# Support matrix\n\nWhat a defense can be trained with. `supported`: the named test shows it. `untested`: not "
        "tried yet. `refused`: the run stops\nbefore the first step. [Refused recipe keys](refused-combinations.md) "
        "and [model families](model-families.md) have pages of\ntheir own. This page is written by `make docs`.\n\n"
        f"| area | feature | status | limits, or why not | shown by |\n|---|---|---|---|---|\n{rows}\n\n"
        "## Versions\n\n`make hosts` runs the tests that stand on the host with Axolotl 0.21 on Python 3.12.\n\n"
        f"| host | what was run | what failed |\n|---|---|---|\n{hosts}\n"
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
        options = [option for option in schema["anyOf"] if option != {"type": "null"}]
        if len(options) > 1:
            return " or ".join(map(_kind, options))
        (schema,) = options
    if "$ref" in schema:
        return "block"
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    bounds = [f"{words} {schema[key]:,}" for key, words in _BOUNDS.items() if key in schema]
    return f"{schema.get('type', 'block')} {' '.join(bounds)}".strip()


_BOUNDS = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
"""How a bound of a JSON Schema reads."""


PAGES = {
    REFERENCE / "settings.md": settings_page,
    REFERENCE / "chains.md": chains_page,
    REFERENCE / "commands.md": commands_page,
    REFERENCE / "refused-combinations.md": refusals_page,
    REFERENCE / "model-families.md": families_page,
    REFERENCE / "support-matrix.md": support_page,
    EXPLANATION / "how-you-could-be-fooled.md": fooled_page,
}
"""All generated pages, and what writes them."""

if __name__ == "__main__":
    for path, page in PAGES.items():
        path.write_text(page(), encoding="utf-8")
