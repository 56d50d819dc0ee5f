"""A recipe as the user wrote it, before Axolotl drops what it does not know."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from tvac_plugin.args import DEFENSE_CONFIGS, SafetyDefenseArgs
from tvac_plugin.documents import DocumentError, read_document

PLUGIN_PATH = "tvac_plugin.SafetyDefensePlugin"
_OUR_KEYS = tuple(SafetyDefenseArgs.model_fields)
_NEAR = 0.8
_AXOLOTLS_OWN = ("pretraining_dataset",)  # near `retain_datasets` by chance


class RecipeError(ValueError):
    """A recipe that cannot be read."""


def read_recipe(path: Path) -> dict[str, Any]:
    """Reads the YAML at `path`.

    Raises:
        RecipeError: There is no such file, it is not plain YAML, or not a mapping.
    """
    try:
        recipe = read_document(path)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}). Give the path of a recipe.") from error
    except DocumentError as error:
        raise RecipeError(f"{path}: {error}") from error
    if not isinstance(recipe, dict):
        raise RecipeError(f"{path}: not a recipe. Write `key: value` lines at the top level.")
    return recipe


def kind_problems(recipe: Mapping[str, Any], wanted: str) -> list[str]:
    """Says which command a recipe is for, if it is not a `wanted` one: "training", "an evaluation" or "a chain"."""
    if "stages" in recipe:
        kind, command = "a chain", "axolotl tvac run"
    elif "base_model" in recipe:
        kind, command = "training", "axolotl train"
    elif {"harmful_score", "over_refusal", "accuracy"} & recipe.keys():
        kind, command = "an evaluation", "axolotl tvac evaluate"
    else:
        return []
    return [] if kind == wanted else [f"this is the recipe of {kind}. Use `{command}` with it."]


def near_misses(recipe: Mapping[str, Any]) -> list[str]:
    """Lists keys that look like one of ours but are not, which Axolotl would drop without a word."""
    problems = []
    for key in recipe:
        match = max(_OUR_KEYS, key=lambda ours: _likeness(str(key), ours))
        if key not in (*_OUR_KEYS, *_AXOLOTLS_OWN) and _likeness(str(key), match) >= _NEAR:
            problems.append(f"`{key}:` is not a key of this plugin. Did you mean `{match}:`?")
    return problems


def plugin_problems(recipe: Mapping[str, Any]) -> list[str]:
    """Lists why Axolotl would not load this plugin for `recipe`, although it trains all the same."""
    plugins = recipe.get("plugins") or []
    if not isinstance(plugins, list):
        return [f"`plugins:` must be a list. Write `plugins: [{PLUGIN_PATH}]`."]
    if PLUGIN_PATH in plugins:
        return []
    wrong = next((plugin for plugin in plugins if _likeness(str(plugin), PLUGIN_PATH) >= _NEAR), None)
    if wrong is not None:
        return [f"plugins: `{wrong}` does not exist, and Axolotl trains without it. Write `{PLUGIN_PATH}`."]
    return [f"the plugin is not loaded, so nothing is defended. Add `plugins: [{PLUGIN_PATH}]`."]


def foreign_code(recipe: Mapping[str, Any]) -> list[str]:
    """Says which code outside Axolotl and this package runs when `recipe` is checked or trained."""
    plugins = recipe.get("plugins")
    named = [("plugins", str(name)) for name in plugins if name != PLUGIN_PATH] if isinstance(plugins, list) else []
    defense = recipe.get("safety_defense")
    if isinstance(defense, str) and "." in defense:
        named.append(("safety_defense", defense))
    lines = [
        f"{key}: {name} is imported, which runs its code." for key, name in named if not name.startswith("axolotl.")
    ]
    if recipe.get("trust_remote_code"):
        lines.append("trust_remote_code: Python code that comes with the model or its tokenizer runs.")
    return lines


def defense_is_absent(recipe: Mapping[str, Any]) -> list[str]:
    """Says that no defense is asked for, if none is."""
    if recipe.get("safety_defense") is not None:
        return []
    return [f"no defense is asked for. Add `safety_defense:` with one of: {', '.join(DEFENSE_CONFIGS)}."]


def _likeness(word: str, name: str) -> float:
    first, second = (text[:100].lower().replace("_", "").replace("-", "") for text in (word, name))
    return SequenceMatcher(None, first, second).ratio()
