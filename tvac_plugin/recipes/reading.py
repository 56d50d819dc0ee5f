"""A recipe as the user wrote it, before Axolotl drops what it does not know."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from tvac_plugin.args import SafetyDefenseArgs
from tvac_plugin.boundary.errors import UserError, bullets, explain
from tvac_plugin.boundary.hosts import loads_installed_plugins
from tvac_plugin.configs import DEFENSE_CONFIGS
from tvac_plugin.configs.simulated_user import SimulatedUserConfig
from tvac_plugin.recipes.safe_yaml import parse_document

PLUGIN_PATH = "tvac_plugin.SafetyDefensePlugin"
_OUR_KEYS = tuple(SafetyDefenseArgs.model_fields)
_NEAR = 0.8
Model = TypeVar("Model", bound=BaseModel)
_AXOLOTLS_OWN = ("pretraining_dataset", "batch_size", "dpo_beta", "rl", "seed", "warmup_ratio")
"""Keys of Axolotl that are near one of ours, or in one of our blocks too."""
_BLOCKS: dict[str, type[BaseModel]] = {**DEFENSE_CONFIGS, "simulated_user": SimulatedUserConfig}


def read_recipe(path: Path) -> dict[str, Any]:
    """Reads the YAML at `path`.

    Raises:
        UserError: There is no such file, it is not plain YAML, or not a mapping.
    """
    try:
        recipe = parse_document(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Give the path of a recipe.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}). Save it as UTF-8.") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"{path}: not a recipe. Write `key: value` lines at the top level.")
    return recipe


def validated(model: type[Model], settings: Mapping[str, Any], *, path: Path) -> Model:
    """The recipe at `path` as its schema.

    Raises:
        UserError: It does not fit; lists what, under the file's name.
    """
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        raise UserError(f"{path}:\n{bullets(explain(error))}") from error


def kind_problems(recipe: Mapping[str, Any], wanted: str) -> list[str]:
    """Says which command a recipe is for, if it is not a `wanted` one: "a training", "an evaluation" or "a chain"."""
    if "stages" in recipe:
        kind, command = "a chain", "axolotl tvac run"
    elif "base_model" in recipe:
        kind, command = "a training", "axolotl train"
    elif {"harmful_score", "over_refusal", "accuracy"} & recipe.keys():
        kind, command = "an evaluation", "axolotl tvac evaluate"
    else:
        return []
    return [] if kind == wanted else [f"this is {kind} recipe. Use `{command}` with it."]


def near_misses(recipe: Mapping[str, Any]) -> list[str]:
    """Lists keys that look like one of ours or stand outside its block, which Axolotl would drop without a word.

    An empty block is among them: its keys are elsewhere, indented wrongly, and its defaults would be trained with.
    """
    problems = [
        f"`{key}:` is empty, so its defaults would be used. Write its keys indented below it, or remove the line."
        for key in (*_BLOCKS, "custom_defense")
        if key in recipe and recipe[key] is None
    ]
    for key in recipe:
        homes = [block for block, config in _BLOCKS.items() if key in config.model_fields]
        if homes and key not in (*_OUR_KEYS, *_AXOLOTLS_OWN):
            home = next((block for block in homes if block == recipe.get("safety_defense")), homes[0])
            problems.append(
                f"`{key}:` is a key of `{home}:`, and nobody reads it here. Write it indented below `{home}:`."
            )
            continue
        meant = _meant_key(str(key))
        if meant != key:
            problems.append(f"`{key}:` is not a key of this plugin. Did you mean `{meant}:`?")
    return problems


def as_meant(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with its misspelt keys put right, so that one slip is not told again as all that follows from it."""
    return {_meant_key(str(key)): value for key, value in recipe.items()} | dict(recipe)


def _meant_key(key: str) -> str:
    """The key of ours that `key` resembles; `key` itself if none, or if it is one that is known."""
    if key in (*_OUR_KEYS, *_AXOLOTLS_OWN):
        return key
    match = max(_OUR_KEYS, key=lambda ours: _likeness(key, ours))
    return match if _likeness(key, match) >= _NEAR else key


def plugin_problems(recipe: Mapping[str, Any]) -> list[str]:
    """Lists why Axolotl would not load this plugin for `recipe`, although it may train all the same."""
    plugins = recipe.get("plugins") or []
    if not isinstance(plugins, list):
        return [f"`plugins:` must be a list. Write `plugins: [{PLUGIN_PATH}]`."]
    wrong = wrong_names(recipe)
    if wrong or PLUGIN_PATH in plugins or loads_installed_plugins():
        return wrong
    return [f"the plugin is not loaded, so nothing is defended. Add `plugins: [{PLUGIN_PATH}]`."]


def wrong_names(recipe: Mapping[str, Any]) -> list[str]:
    """Lists plugins that look like this one: none loads it, or it is loaded a second time."""
    return [
        f"plugins: `{plugin}` is not this plugin's name. Write `{PLUGIN_PATH}`."
        for plugin in map(str, recipe.get("plugins") or [])
        if plugin != PLUGIN_PATH and (_likeness(plugin, PLUGIN_PATH) >= _NEAR or plugin.startswith("tvac_plugin."))
    ]


def foreign_code(recipe: Mapping[str, Any]) -> list[str]:
    """Says which code outside Axolotl and this package runs when `recipe` is checked, trained or evaluated."""
    plugins = recipe.get("plugins")
    named = [("plugins", str(name)) for name in plugins if name != PLUGIN_PATH] if isinstance(plugins, list) else []
    defense = recipe.get("safety_defense")
    if isinstance(defense, str) and "." in defense:
        named.append(("safety_defense", defense))
    named += [
        (f"{measure}.{key}", str(source[key]))
        for measure in ("harmful_score", "over_refusal")
        if isinstance(source := recipe.get(measure), Mapping)
        for key in ("judge", "second_judge")
        if "." in str(source.get(key))
    ]
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


@cache
def _likeness(word: str, name: str) -> float:
    first, second = (text[:100].lower().replace("_", "").replace("-", "") for text in (word, name))
    return SequenceMatcher(None, first, second).ratio()
