"""Passwords and keys in recipes, which no result may hold."""

from __future__ import annotations

import atexit
import os
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import yaml

LEFT_OUT = "(left out, it is a secret)"
_SECRET = re.compile(
    r"(?:^|[._-])(?:(?:api|access|secret|private|auth|ssh|account)_?keys?|token|secrets?|password|passwd|pwd|passphrase"
    r"|authorization|credentials?)$|storage_options\.key$"
)
_IN_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*://)[^/\s@:]+:[^/\s@]+@", re.IGNORECASE)
"""A user and a password in front of a host."""
_WORDS_OF_A_TOKENIZER = re.compile(
    r"(?:^|[._-])(?:bos|eos|pad|unk|sep|cls|mask|eot|eom|image|audio|video|boi|eoi|special|last|next)_token$"
)


def is_secret(key: object) -> bool:
    """Whether a key's value is a password by the key's name, as `hub_token`; `eos_token` is not."""
    name = str(key).lower()
    return _SECRET.search(name) is not None and _WORDS_OF_A_TOKENIZER.search(name) is None


def without_secrets(value: Any, *, where: str = "") -> Any:
    """A copy of a recipe, or of what is in it at the key `where`, with a remark in place of each secret."""
    if isinstance(value, Mapping):
        names = {key: f"{where}.{key}" for key in value}
        return {
            key: LEFT_OUT if _holds(names[key], inner) else without_secrets(inner, where=names[key])
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_secrets(inner, where=where) for inner in value]
    return _IN_ADDRESS.sub(rf"\1{LEFT_OUT}@", value) if isinstance(value, str) else value


def has_secrets(value: Any) -> bool:
    """Whether a recipe holds a secret anywhere."""
    return bool(without_secrets(value) != (list(value) if isinstance(value, tuple) else value))


def hide_secrets(cfg: Any) -> None:
    """Keeps Axolotl from printing a key in its log, and from publishing the whole recipe in the model's README."""
    if cfg.get("comet_api_key"):
        os.environ["COMET_API_KEY"] = str(cfg.pop("comet_api_key"))
    path = cfg.get("axolotl_config_path")
    recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8")) if path else None
    if not has_secrets(recipe):
        return
    with NamedTemporaryFile("w", encoding="utf-8", suffix=".yml", prefix="recipe_", delete=False) as copy:
        yaml.safe_dump(without_secrets(recipe), copy, sort_keys=False)
    atexit.register(Path(copy.name).unlink, missing_ok=True)
    cfg.axolotl_config_path = copy.name


def _holds(key: object, value: Any) -> bool:
    """Switches such as `hf_use_auth_token: true` are no secrets, and neither is a key without a value."""
    return is_secret(key) and value not in (None, "") and not isinstance(value, bool)
