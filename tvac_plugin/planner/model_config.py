"""The shape of the model: its `config.json`, from a file, a folder or the hub's cache; never its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.boundary.files import is_missing_folder

_NAME = "config.json"


def load_model_config(recipe: Mapping[str, Any], file: Path | None = None) -> PretrainedConfig:
    """Reads the model's shape without touching the network.

    Args:
        recipe: Names the model as `base_model_config` or `base_model`.
        file: A `config.json` to read instead.

    Raises:
        UserError: There is none at hand, or it describes no model of the installed transformers.
    """
    name = str(file or recipe.get("base_model_config") or recipe.get("base_model"))
    if file is not None and not file.is_file():
        raise UserError(f"--model-config {file}: there is no such file. Give the path of a {_NAME}.")
    if file is None and is_missing_folder(name):
        raise UserError(
            f"base_model: {name} does not exist. Make the model first, or correct the path: it is relative "
            "to where you start axolotl."
        )
    try:
        config = AutoConfig.from_pretrained(name, revision=recipe.get("revision_of_model"), local_files_only=True)
        config.update(recipe.get("overrides_of_model_config") or {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(_advice(name, error)) from error
    config.use_cache = False
    return config


def _advice(name: str, error: Exception) -> str:
    if Path(name).exists():
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return (
            f"{name}: no shape of a model that transformers knows could be read from it ({first_line}). "
            f"Give a {_NAME} with `--model-config FILE`."
        )
    return (
        f"base_model: the shape of {name} is not on this machine. Fetch it once with `hf download {name} {_NAME}`, or "
        f"give any {_NAME} of that shape with `--model-config FILE`. No weights are needed."
    )
