"""What makes two runs the same run: defense, settings, seed and data; and the versions that they ran with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.boundary.secrets import without_secrets
from tvac_plugin.configs.base import DefenseConfig
from tvac_plugin.defenses import defense_name

FORMAT = 3
_PACKAGES = ("tvac-plugin", "torch", "transformers", "trl", "peft", "accelerate", "axolotl")


def run_facts(config: DefenseConfig, *, seed: int) -> dict[str, Any]:
    """What a manifest and a checkpoint say of the run before its data are known."""
    return {
        "format": FORMAT,
        "defense": defense_name(config),
        "settings": without_secrets(config.model_dump(mode="json")),
        "seed": seed,
    }


def refuse_other_run(earlier: Mapping[str, Any], now: Mapping[str, Any], *, checkpoint: Path) -> None:
    """Holds two runs' facts against each other; only what `now` names counts.

    Raises:
        UserError: They differ; lists what, as `key: old -> new`.
    """
    if earlier["defense"] != now["defense"]:
        differences = [f"safety_defense: {earlier['defense']} -> {now['defense']}"]
    else:
        old, new = ({key: facts.get(key) for key in now if key != "defense"} for facts in (earlier, now))
        differences = list(_differences(old, new, path=""))
    if differences:
        raise UserError(
            f"{checkpoint} was written by another run than this one, and a model defended half so and half so is "
            f"neither: {'; '.join(differences)}. Restore these, or start anew without resuming."
        )


def _differences(old: Any, new: Any, *, path: str) -> Iterator[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key), new.get(key), path=f"{path}.{key}" if path else str(key))
    elif old != new:
        yield f"{path}: {_shown(old)} -> {_shown(new)}"


def _shown(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def versions() -> dict[str, str]:
    """Installed versions of what decides the result, by package."""

    def installed(packages: Iterable[str]) -> Iterable[tuple[str, str]]:
        for package in packages:
            try:
                yield package, version(package)
            except PackageNotFoundError:
                continue

    return dict(installed(_PACKAGES))
