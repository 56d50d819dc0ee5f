"""Which files decide what a model does, and their hashes: the model's own, and those of the model it was made from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from tvac_plugin.boundary.files import sha256

_DECIDING = {".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".tiktoken", ".py"}
"""Weights, adapter, model, generation and tokenizer settings, chat templates, vocabularies, and code of the model."""
_OF_THE_RUN = (
    "training_args", "trainer_state", "optimizer", "scheduler", "rng_state", "scaler", "tokens_state", "safety_",
    "simulated_user", "eval_", "train_results", "all_results",
)  # fmt: skip
"""Beginnings of names of files that training leaves beside them and that no model is loaded from."""
_FOLDERS = ("additional_chat_templates", "custom_generate")
_NOT_A_FILE = "not a file"
_ADAPTER_CONFIG = "adapter_config.json"
_BASE = (
    "config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)  # fmt: skip


def file_hashes(model_dir: Path) -> dict[str, str]:
    """SHA-256 of every file in `model_dir` that decides what the model does, by its path there."""
    paths = [*model_dir.iterdir(), *(path for folder in _FOLDERS for path in (model_dir / folder).rglob("*"))]
    deciding = [path for path in paths if path.suffix in _DECIDING and not _is_of_the_run(path)]
    return {
        path.relative_to(model_dir).as_posix(): content_hash(path) if path.is_file() else _NOT_A_FILE
        for path in sorted(deciding)
    }


def content_hash(path: Path) -> str:
    """SHA-256 of a file; of an adapter's settings whatever the order of their lists, which PEFT leaves to chance."""
    if path.name != _ADAPTER_CONFIG:
        return sha256(path)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        return sha256(path)
    ordered = {key: sorted(map(str, value)) if isinstance(value, list) else value for key, value in settings.items()}
    return hashlib.sha256(json.dumps(ordered, sort_keys=True).encode()).hexdigest()


def _is_of_the_run(path: Path) -> bool:
    """Code is never: a model may name a module of any name."""
    return path.name.startswith(_OF_THE_RUN) and path.suffix != ".py"


def weight_hashes(model_dir: Path) -> dict[str, str]:
    """The same for weights alone."""
    hashes = file_hashes(model_dir)
    return {name: value for name, value in hashes.items() if name.endswith((".safetensors", ".bin"))}


def base_hashes(name: str) -> dict[str, str]:
    """SHA-256 of a base model's config and of all its weight files.

    Args:
        name: A folder, or a hub id whose files are in the cache of this machine; of others nothing is known.
    """
    found = [path for file in _BASE if (path := _local_file(name, file)) is not None]
    shards = [shard for index in found if index.name.endswith(".index.json") for shard in _named_in(index)]
    found += [path for shard in shards if (path := _local_file(name, shard)) is not None]
    return {path.name: sha256(path) for path in found}


def _named_in(index: Path) -> list[str]:
    try:
        return sorted({str(file) for file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return []  # the index itself is hashed


def _local_file(name: str, file: str) -> Path | None:
    path = Path(name) / file
    if not Path(name).is_dir():
        try:
            cached = try_to_load_from_cache(name, file)
        except HFValidationError:  # a folder that is not here
            return None
        path = Path(cached) if isinstance(cached, str) else path
    return path if path.is_file() else None
