"""Tells before any training whether a recipe will really train with its defense."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from tvac_plugin.args import SafetyDefenseArgs, defense_config, defense_problems, simulated_user_config
from tvac_plugin.boundary.errors import explain
from tvac_plugin.boundary.files import is_missing_folder
from tvac_plugin.configs.base import DATA_KEYS, DefenseConfig
from tvac_plugin.configs.refusals import REFUSALS
from tvac_plugin.data.fingerprints import data_facts, prompt_keys
from tvac_plugin.data.taught_answers import decoding
from tvac_plugin.planner.outlook import outlook, warnings
from tvac_plugin.recipes.reading import as_meant, defense_is_absent, kind_problems, near_misses, plugin_problems

Say = Callable[[str], None]


@dataclass
class CheckResult:
    """What a check found.

    Attributes:
        problems: Why the recipe would not train as it says, one sentence each; empty when it would.
        facts: What the manifest will say of the data; empty when the data were not looked at.
        outlook: What the training will do; empty when the data were not looked at.
        warnings: What is hardly meant, and what ends in an error on this machine, one sentence each.
    """

    problems: list[str]
    facts: dict[str, Any] = field(default_factory=dict)
    outlook: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def check_recipe(
    recipe: dict[str, Any],
    *,
    with_data: bool = True,
    allow_shared_prompts: bool = False,
    say: Say = lambda _doing: None,
) -> CheckResult:
    """Goes through a recipe as `axolotl train` would, up to where weights are loaded; leaves no file behind.

    Args:
        recipe: The YAML as the user wrote it.
        with_data: Whether to load the model's config, its tokenizer and all data sets.
        allow_shared_prompts: Accept prompts that occur in `datasets` and in `harmful_datasets`.
        say: Told what is done next.
    """
    problems = recipe_problems(recipe)
    if kind_problems(recipe, "a training"):
        return CheckResult(problems)
    with _quiet():
        say("Axolotl's own validation")
        if problems:
            return CheckResult([*problems, *(_others(recipe) if with_data else [])])
        cfg, problems = _validated(recipe, with_data=with_data)
        if problems or not with_data:
            return CheckResult(problems, warnings=_dropped_keys(recipe) + warnings(recipe, None, num_layers=None))
        if recipe.get("simulated_user"):
            result = _check_attack(cfg, _Attempt(say))
        elif recipe["safety_defense"] == "none":
            result = CheckResult([])
        else:
            result = _check_data(cfg, _Attempt(say), allow_shared_prompts=allow_shared_prompts)
        layers = None if result.problems else _num_layers(cfg)
        result.warnings = _dropped_keys(recipe) + warnings(recipe, defense_config(cfg), num_layers=layers)
        if result.facts:
            own = result.facts.get("datasets")
            rows = own["rows"] if own else sum(facts["rows"] for facts in result.facts.values())
            result.outlook = outlook(cfg, defense_config(cfg), rows=rows, num_layers=layers)
        return result


def recipe_problems(recipe: dict[str, Any]) -> list[str]:
    """Lists what is wrong with a recipe as far as this plugin can tell without Axolotl, data or model."""
    other_kind = kind_problems(recipe, "a training")
    if other_kind:
        return other_kind
    meant = as_meant(recipe)
    return plugin_problems(recipe) + near_misses(recipe) + defense_is_absent(meant) + own_problems(meant)


def own_problems(recipe: dict[str, Any]) -> list[str]:
    """Lists what is wrong with the keys of this plugin, without Axolotl's own validation."""
    ours = {key: recipe[key] for key in SafetyDefenseArgs.model_fields if key in recipe}
    try:
        SafetyDefenseArgs.model_validate(ours)
    except ValidationError as error:
        problems = explain(error)
        is_field_error = any(detail["loc"] for detail in error.errors())
        return problems if is_field_error else defense_problems(recipe)
    return defense_problems(recipe)


def _others(recipe: dict[str, Any]) -> list[str]:
    """What else is wrong with a recipe that has problems already: its model, its files, and what is Axolotl's own."""
    from axolotl.cli.config import gpu_capabilities
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    from tvac_plugin.data.entries import entry_problems

    problems = missing_model(recipe)
    for key in ("datasets", "test_datasets", *DATA_KEYS):
        entries = recipe.get(key)
        if isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries):
            problems += entry_problems(entries, key=key, train_on_inputs=bool(recipe.get("train_on_inputs")))
    refused = {r.key for r in REFUSALS if recipe.get(r.key) is not None and r.refused(recipe[r.key])}
    seen = {*SafetyDefenseArgs.model_fields, *refused, "plugins"}
    rest = {key: value for key, value in recipe.items() if key not in seen}
    if rest.get("datasets"):
        capabilities, env_capabilities = gpu_capabilities()
        try:
            validate_config(DictDefault(rest), capabilities=capabilities, env_capabilities=env_capabilities)
        except Exception as error:
            problems += explain(error)
    return problems


def _dropped_keys(recipe: dict[str, Any]) -> list[str]:
    """Keys that neither Axolotl nor this plugin has; another plugin may have them, else Axolotl drops them."""
    from axolotl.utils.schemas.config import AxolotlInputConfig

    known = {*AxolotlInputConfig.model_fields, *SafetyDefenseArgs.model_fields}
    known |= {str(named.alias) for named in AxolotlInputConfig.model_fields.values() if named.alias}
    unknown = {str(key): get_close_matches(str(key), known, n=1) for key in recipe if key not in known}
    return [
        f"`{key}:` is no key of Axolotl's or this plugin's, so Axolotl drops it, unless another plugin reads it. "
        + (f"Did you mean `{near[0]}`?" if near else "Correct or remove it.")
        for key, near in unknown.items()
    ]


def missing_model(recipe: Mapping[str, Any]) -> list[str]:
    """One sentence if `base_model:` can only mean a folder, and it is not there."""
    base_model = str(recipe.get("base_model"))
    if not is_missing_folder(base_model):
        return []
    return [
        f"base_model: {base_model} does not exist. Make the model first, or correct the path: it is relative "
        "to where you start axolotl."
    ]


def _num_layers(cfg: Any) -> int | None:
    from axolotl.loaders.utils import load_model_config

    text = load_model_config(cfg).get_text_config()
    return int(text.num_hidden_layers)


def _validated(recipe: dict[str, Any], *, with_data: bool) -> tuple[Any, list[str]]:
    from axolotl.cli.config import gpu_capabilities, prepare_plugins
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.config import normalize_cfg_datasets, normalize_config, validate_config
    from axolotl.utils.dict import DictDefault

    missing = missing_model(recipe)
    if missing:
        return None, missing
    cfg = DictDefault(recipe)
    manager = PluginManager.get_instance()
    manager.plugins.clear()
    try:
        missing = _missing_plugins(recipe, lambda: prepare_plugins(cfg), manager.plugins)
        if missing:
            return cfg, [f"plugins: {name} cannot be imported. Install it or remove it." for name in missing]
        capabilities, env_capabilities = gpu_capabilities()
        cfg = validate_config(cfg, capabilities=capabilities, env_capabilities=env_capabilities)
        if with_data:
            normalize_config(cfg)
        normalize_cfg_datasets(cfg)
    except Exception as error:
        return cfg, explain(error)
    return cfg, []


def _missing_plugins(recipe: dict[str, Any], load: Callable[[], None], loaded: Collection[str]) -> list[str]:
    """Names the plugins that `load` passes over, or the first at which it stops, as Axolotl does from 0.21 on."""
    named = [str(name) for name in recipe.get("plugins") or []]
    try:
        load()
    except ImportError:
        stopped_at = [name for name in named if name not in loaded][:1]
        if not stopped_at:
            raise
        return stopped_at
    return [name for name in named if name not in loaded]


def _check_data(cfg: Any, attempt: _Attempt, *, allow_shared_prompts: bool) -> CheckResult:
    from axolotl.integrations.base import PluginManager
    from axolotl.loaders import load_tokenizer

    from tvac_plugin.data.loading import other_trainers, tokenize, training_problems
    from tvac_plugin.plugin import SafetyDefensePlugin

    config = defense_config(cfg)
    assert config is not None
    plugin = next(p for p in PluginManager.get_instance().plugins.values() if isinstance(p, SafetyDefensePlugin))
    attempt(
        "base_model",
        lambda: attempt.problems.extend(training_problems(cfg, config, other_trainers=other_trainers(plugin, cfg))),
    )
    tokenizer = attempt("tokenizer", lambda: load_tokenizer(cfg), doing="the tokenizer")
    if attempt.problems:
        return CheckResult(attempt.problems)
    with tempfile.TemporaryDirectory() as scratch:
        cfg.dataset_prepared_path = scratch
        alignment = attempt("", lambda: tokenize(cfg, tokenizer, "datasets"), doing="the rows of datasets")
        evaluation = attempt("", lambda: tokenize(cfg, tokenizer, "test_datasets")) if cfg.test_datasets else None
        others = _check_streams(attempt, cfg, config, tokenizer)
        if attempt.problems:
            return CheckResult(attempt.problems)
        facts = attempt("", lambda: data_facts(alignment, others, decode=decoding(tokenizer)), doing="what they share")
        shared = _shared_prompts(
            alignment, others.get("harmful_datasets"), evaluation, allow_shared_prompts=allow_shared_prompts
        )
        return CheckResult(attempt.problems + shared, facts or {})


def _check_attack(cfg: Any, attempt: _Attempt) -> CheckResult:
    from axolotl.loaders import load_tokenizer

    from tvac_plugin.data.loading import load_user_data

    user, config = simulated_user_config(cfg), defense_config(cfg)
    assert user is not None
    tokenizer = attempt("tokenizer", lambda: load_tokenizer(cfg), doing="the tokenizer")
    with tempfile.TemporaryDirectory() as scratch:
        cfg.dataset_prepared_path = scratch
        loaded = None
        if not attempt.problems:
            loaded = attempt("", lambda: load_user_data(cfg, user, tokenizer), doing="the simulated user's rows")
        if config is not None and loaded is not None:
            _check_streams(attempt, cfg, config, tokenizer)
    return CheckResult(attempt.problems, loaded[1] if loaded else {})


def _check_streams(attempt: _Attempt, cfg: Any, config: DefenseConfig, tokenizer: Any) -> dict[str, Any]:
    """Loads the data that the defense reads beside the training data, and makes its batches' sources."""
    from tvac_plugin.data.loading import load_rows, training_problems
    from tvac_plugin.data.streams import Streams

    attempt("", lambda: attempt.problems.extend(training_problems(cfg, config, other_trainers=())))
    if attempt.problems:
        return {}
    attempt("", lambda: config.with_tokenizer(tokenizer))
    rows = attempt("", lambda: load_rows(cfg, config, tokenizer), doing="the rows that the defense reads") or {}
    if not attempt.problems:
        attempt("", lambda: Streams(config, rows, dict, pad_id=0, seed=0))
    return dict(rows)


class _Attempt:
    """Runs steps that read the user's files; what goes wrong becomes a problem instead of a traceback."""

    def __init__(self, say: Say) -> None:
        self.problems: list[str] = []
        self._say = say

    def __call__(self, key: str, step: Callable[[], Any], *, doing: str | None = None) -> Any:
        if doing is not None:
            self._say(doing)
        try:
            return step()
        except Exception as error:
            said = explain(error)[0]
            self.problems.append(f"{key}: cannot be loaded: {said.rstrip('.')}." if key else said)
            return None


def _shared_prompts(alignment: Any, harmful: Any, evaluation: Any, *, allow_shared_prompts: bool) -> list[str]:
    pairs = []
    if harmful is not None and not allow_shared_prompts:
        pairs.append(("harmful_datasets", harmful, "datasets", alignment))
    if evaluation is not None:
        pairs.append(("test_datasets", evaluation, "datasets", alignment))
        if harmful is not None:
            pairs.append(("test_datasets", evaluation, "harmful_datasets", harmful))
    problems = []
    for name, rows, other_name, others in pairs:
        shared = set(prompt_keys(rows)) & set(prompt_keys(others))
        if shared:
            problems.append(
                f"{len(shared)} prompts of {name} are also in {other_name}. Take disjoint rows, for example with "
                "`split: train[:2000]` and `split: train[2000:2200]`."
            )
    return problems


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    import datasets

    bars = datasets.is_progress_bar_enabled()
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logging.disable(disabled)
        if bars:
            datasets.enable_progress_bars()
