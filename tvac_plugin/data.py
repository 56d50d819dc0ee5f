"""Data for the defense and of simulated users, loaded by Axolotl's own prompt strategies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from axolotl.common.datasets import TrainDatasetMeta
from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.loaders.utils import load_model_config
from axolotl.utils.config import normalize_cfg_datasets
from axolotl.utils.data import prepare_datasets
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.datasets import SFTDataset
from axolotl.utils.trainer import calculate_total_num_steps, process_datasets_for_packing
from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tvac_plugin.attack import compose
from tvac_plugin.configs.base import DefenseConfig, did_you_mean
from tvac_plugin.configs.perturbation import TVaccineConfig
from tvac_plugin.configs.simulated_user import SimulatedUserConfig
from tvac_plugin.files import DATA_SUFFIXES
from tvac_plugin.names import local_path


def entry_problems(entries: Sequence[Mapping[str, Any]] | None, *, key: str) -> list[str]:
    """Lists what is wrong with data set entries under `key`: unknown keys, missing or empty files."""
    problems = []
    for number, entry in enumerate(entries or []):
        where = f"{key}[{number}]"
        problems += [
            f"{where}: unknown key `{name}`.{did_you_mean(str(name), SFTDataset.model_fields)}"
            for name in entry
            if name not in SFTDataset.model_fields
        ]
        path = entry.get("path")
        if not path:
            problems.append(f"{where}: `path:` is missing. Name a file, a folder or a data set on the hub.")
        elif _is_local(str(path)):
            problems += _file_problems(where, str(path))
    return problems


def training_problems(cfg: DictDefault, config: DefenseConfig, *, other_trainers: Sequence[str]) -> list[str]:
    """Lists why a validated recipe cannot be trained with its defense, before any weights are loaded.

    Args:
        cfg: The recipe after Axolotl's validation.
        config: The defense it selects.
        other_trainers: Plugins that bring a trainer of their own.
    """
    problems = [
        f"plugins: {name} brings its own trainer, and there can be only one. Remove it from `plugins:`."
        for name in other_trainers
    ]
    for key in config.data_keys():
        problems += entry_problems(cfg[key], key=key)
    if isinstance(config, TVaccineConfig):
        problems += _layer_problems(config, load_model_config(cfg))
    return problems


def other_trainers(plugin: BasePlugin, cfg: DictDefault) -> list[str]:
    """Names the loaded plugins, other than `plugin`, that bring a trainer for `cfg`."""
    plugins: Mapping[str, BasePlugin] = PluginManager.get_instance().plugins
    return [name for name, other in plugins.items() if other is not plugin and other.get_trainer_cls(cfg) is not None]


def load_user_data(
    cfg: DictDefault, config: SimulatedUserConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[TrainDatasetMeta, dict[str, Any]]:
    """Tokenizes and mixes a simulated user's data, ready for Axolotl's trainer.

    Returns:
        The data sets with their number of steps, and the facts for the manifest.

    Raises:
        ValueError: A file is missing, a pool is too small, or prompts are shared with protected data.
    """
    entries = [*(config.task_datasets or []), *(config.harmful_datasets or []), *(config.disjoint_from or [])]
    problems = entry_problems(entries, key="simulated_user")
    if problems:
        raise ValueError(" ".join(problems))

    def rows(entries: list[dict[str, Any]] | None) -> Dataset | None:
        return tokenize(DictDefault({**cfg, "entries": entries}), tokenizer, "entries") if entries else None

    protected = {str(entry["path"]): rows([entry]) for entry in config.disjoint_from or []}
    user = compose(config, task=rows(config.task_datasets), harmful=rows(config.harmful_datasets), protected=protected)
    evaluation = tokenize(cfg, tokenizer, "test_datasets") if cfg.test_datasets else None
    train = user.rows
    if cfg.sample_packing:
        train, evaluation = process_datasets_for_packing(cfg, train, evaluation)
    num_steps = calculate_total_num_steps(cfg, train)
    if cfg.max_steps:
        num_steps = min(num_steps, cfg.max_steps)
    return TrainDatasetMeta(train_dataset=train, eval_dataset=evaluation, total_num_steps=num_steps), user.facts


def load_rows(cfg: DictDefault, config: DefenseConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Dataset]:
    """Tokenizes the data that a defense reads beside the training data, as `datasets` would be, in file order.

    Args:
        cfg: The recipe after Axolotl's validation; it is not changed.
        config: The defense's settings.
        tokenizer: The model's tokenizer.

    Returns:
        Rows with `input_ids`, `attention_mask` and `labels`, by key of the recipe.

    Raises:
        ValueError: A file is missing or no row is left.
    """
    rows = {key: tokenize(cfg, tokenizer, key) for key in config.data_keys() if cfg[key]}
    for key, loaded in rows.items():
        if len(loaded) == 0:
            raise ValueError(f"{key}: no example was left after loading. Give at least one.")
        limit = config.row_limit(key)
        rows[key] = loaded if limit is None else loaded.select(range(min(limit, len(loaded))))
    return rows


def tokenize(cfg: DictDefault, tokenizer: PreTrainedTokenizerBase, key: str) -> Dataset:
    """Tokenizes the entries under `key` of a recipe with Axolotl's prompt strategies, unpacked and unshuffled."""
    alone = DictDefault(
        {
            **cfg,
            "datasets": [dict(entry) for entry in cfg[key]],
            "test_datasets": None,
            "val_set_size": 0.0,
            "sample_packing": False,
            "eval_sample_packing": False,
            "max_steps": None,
            "total_num_tokens": None,
            "total_supervised_tokens": None,
            "streaming": False,
            "pretraining_dataset": None,
            "shuffle_merged_datasets": False,
        }
    )
    normalize_cfg_datasets(alone)
    rows, *_ = prepare_datasets(alone, tokenizer)
    return rows


def _layer_problems(config: TVaccineConfig, model_config: Any) -> list[str]:
    text_config = model_config.get_text_config() if isinstance(model_config, PretrainedConfig) else model_config
    num_layers = text_config.num_hidden_layers
    if config.num_active_layers <= num_layers:
        return []
    return [
        f"t_vaccine.num_active_layers: {config.num_active_layers} is more than the model's {num_layers} layers. "
        f"Set it to {num_layers} or less."
    ]


def _is_local(path: str) -> bool:
    found = local_path(path)
    return found is None or path.startswith((".", "/", "~")) or found.suffix in DATA_SUFFIXES or found.exists()


def _file_problems(where: str, text: str) -> list[str]:
    path = local_path(text)
    if path is None or not path.exists():
        return [f"{where}: {text} does not exist. Correct `path:`, it is relative to where you start axolotl."]
    if path.is_file() and not path.read_bytes().strip():
        return [f"{where}: {path} is empty. Give at least one example."]
    return []
