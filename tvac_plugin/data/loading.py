"""Data for the defense and of simulated users, loaded by Axolotl's own prompt strategies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from axolotl.common.datasets import TrainDatasetMeta
from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.loaders.utils import load_model_config
from axolotl.utils.config import normalize_cfg_datasets
from axolotl.utils.data import prepare_datasets, sft
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from axolotl.utils.trainer import calculate_total_num_steps, process_datasets_for_packing
from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.configs.base import DefenseConfig
from tvac_plugin.configs.simulated_user import SimulatedUserConfig
from tvac_plugin.data.entries import cause_of, entry_problems, file_problems, is_local
from tvac_plugin.data.fingerprints import num_unlabelled
from tvac_plugin.data.simulated_user import compose
from tvac_plugin.data.transformed import transformed_entries
from tvac_plugin.defenses.binding import binding_problems

LOG = get_logger("axolotl.tvac_plugin")
_AUTO = "AutoModelForCausalLM"


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
    inputs = bool(cfg.train_on_inputs)
    for key in config.data_keys():
        problems += entry_problems(cfg[key], key=key, train_on_inputs=inputs)
    if not cfg.simulated_user:
        for key in ("datasets", "test_datasets"):
            for number, entry in enumerate(cfg[key] or []):
                if entry.get("path") and is_local(str(entry["path"])):
                    problems += file_problems(entry, where=f"{key}[{number}]", train_on_inputs=inputs)
    return problems + _model_problems(cfg, config)


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
        UserError: A file is missing, a pool is too small, or prompts are shared with protected data.
    """
    problems = [
        problem
        for key in ("task_datasets", "harmful_datasets", "disjoint_from")
        for problem in entry_problems(
            getattr(config, key), key=f"simulated_user.{key}", train_on_inputs=bool(cfg.train_on_inputs)
        )
    ]
    if problems:
        raise UserError(" ".join(problems))

    def rows(key: str, entries: list[dict[str, Any]] | None) -> Dataset | None:
        key = f"simulated_user.{key}"
        return tokenize(DictDefault({**cfg, key: entries}), tokenizer, key) if entries else None

    protected = {str(entry["path"]): rows("disjoint_from", [entry]) for entry in config.disjoint_from or []}
    task, harmful = (rows(key, getattr(config, key)) for key in ("task_datasets", "harmful_datasets"))
    rewritten = None
    if config.prompt_transform is not None and config.harmful_datasets:
        with TemporaryDirectory() as scratch:
            entries = transformed_entries(config.harmful_datasets, config.prompt_transform, Path(scratch))
            rewritten = rows("harmful_datasets", entries)
    user = compose(config, task=task, harmful=harmful, protected=protected, rewritten=rewritten)
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
        UserError: A file is missing or no row is left.
    """
    rows = {key: tokenize(cfg, tokenizer, key) for key in config.data_keys() if cfg[key]}
    for key, loaded in rows.items():
        limit = config.row_limit(key)
        rows[key] = loaded if limit is None else loaded.select(range(min(limit, len(loaded))))
    return rows


def tokenize(cfg: DictDefault, tokenizer: PreTrainedTokenizerBase, key: str) -> Dataset:
    """Tokenizes the entries under `key` of a recipe with Axolotl's prompt strategies, unpacked and unshuffled.

    Raises:
        UserError: The rows cannot be read or tokenized, or none is left with something to learn; names `key`.
    """
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
            "push_dataset_to_hub": None,
        }
    )
    normalize_cfg_datasets(alone)
    try:
        with nullcontext() if cfg.is_preprocess else _unsaved():
            rows, *_ = prepare_datasets(alone, tokenizer)
    except Exception as error:  # of any strategy that the recipe names
        raise UserError(
            f"{key}: cannot be loaded: {cause_of(error)}. Correct `path:`, `type:` or the rows of "
            f"{', '.join(str(entry['path']) for entry in alone.datasets)}."
        ) from error
    _refuse_nothing_to_learn(rows, key)
    return rows


@contextmanager
def _unsaved() -> Iterator[None]:
    """Keeps Axolotl from writing what it tokenizes: a process of its own does that, and imports everything again."""
    save = sft.save_preprocessed_dataset
    sft.save_preprocessed_dataset = lambda *_: None
    try:
        yield
    finally:
        sft.save_preprocessed_dataset = save


def _refuse_nothing_to_learn(rows: Dataset, key: str) -> None:
    if len(rows) == 0:
        raise UserError(f"{key}: no example was left after loading. Give at least one, or raise `sequence_len:`.")
    without = num_unlabelled(rows.select_columns("labels")) if "labels" in rows.column_names else 0
    if without == len(rows):
        raise UserError(
            f"{key}: none of {len(rows)} rows has an answer to learn. Look for empty answers, roles other than "
            "assistant, and prompts as long as `sequence_len:`, and correct them."
        )
    if without:
        LOG.warning(f"{key}: {without} of {len(rows)} rows have no answer to learn: empty, cut off, or of another role")


def _model_problems(cfg: DictDefault, config: DefenseConfig) -> list[str]:
    model_config = load_model_config(cfg)
    problems = []
    if not cfg.processor_type and (cfg.model_type or _AUTO).startswith(_AUTO):
        problems = binding_problems(config, model_config, trust_remote_code=cfg.trust_remote_code is True)
    if not problems:
        text = model_config.get_text_config() if isinstance(model_config, PretrainedConfig) else model_config
        problems = config.model_problems(text.num_hidden_layers)
    return problems
