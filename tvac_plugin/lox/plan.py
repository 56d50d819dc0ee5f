"""Which tensors of an aligned model LoX changes, and how: all checks of the folders, before anything is written."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.lox.extrapolation import check_settings, extrapolate_factors, extrapolate_weight
from tvac_plugin.lox.tensor_files import Entry, Rewrite, read_entries, read_json

ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
MODEL_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_FACTOR = re.compile(r"(?P<layer>.+\.lora_(?:embedding_)?)(?P<half>[AB])(?P<suffix>(?:\.weight)?)")
_OTHER_PRODUCTS = ("use_dora", "use_qalora", "use_bdlora", "target_parameters", "monteclora_config")
_STARTS_AT_BASE = {"true", "false", "gaussian", "eva", "orthogonal", "mica"}


@dataclass(frozen=True)
class Extrapolation:
    """What becomes of the weights of a folder.

    Attributes:
        rewrites: For each weight file, the tensors with new values; the others stay.
        index: The index of a sharded checkpoint, which stays as it is.
    """

    rewrites: dict[Path, list[Rewrite]]
    index: Path | None


def plan_extrapolation(aligned: Path, base: Path | None, *, rank: int, coefficient: float) -> Extrapolation:
    """Plans the extrapolation of `aligned`, an adapter or a full checkpoint.

    Raises:
        UserError: A setting, a folder or a tensor in it does not allow it.
    """
    check_settings(rank, coefficient)
    for folder in (aligned, base):
        if folder is not None and not folder.is_dir():
            raise UserError(f"{folder}: no such folder. Name a folder with a model on this machine.")
    if not (aligned / ADAPTER_CONFIG).is_file():
        return _plan_checkpoint(aligned, base, rank=rank, coefficient=coefficient)
    if base is not None:
        raise UserError(f"{aligned}: an adapter is its own change, so a base is not needed. Leave out --base.")
    return _plan_adapter(aligned, rank=rank, coefficient=coefficient)


def _plan_adapter(aligned: Path, *, rank: int, coefficient: float) -> Extrapolation:
    _check_adapter_config(aligned / ADAPTER_CONFIG)
    file = aligned / ADAPTER_FILE
    if not file.is_file():
        raise _no_safetensors(aligned, "adapter_model")
    step = partial(_new_b, rank=rank, coefficient=coefficient)
    rewrites = [Rewrite(b, partial(step, a, b)) for a, b in _factor_pairs(file)]
    if not rewrites:
        raise UserError(f"{file}: holds no LoRA matrices. Name the folder that training wrote.")
    return Extrapolation({file: rewrites}, None)


def _check_adapter_config(path: Path) -> None:
    config = read_json(path)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{path}: peft_type is {kind}, not LORA. Merge the adapter, then name both models.")
    for key in _OTHER_PRODUCTS:
        if config.get(key):
            raise UserError(f"{path}: with {key} the change is not B A. Merge the adapter, then name both models.")
    start = str(config.get("init_lora_weights", True)).lower()
    if start not in _STARTS_AT_BASE:
        raise UserError(
            f"{path}: init_lora_weights: {start} moves the base, so the change is not B A. "
            "Convert the adapter to plain LoRA, or merge it and name both models."
        )


def _factor_pairs(file: Path) -> Iterable[tuple[Entry, Entry]]:
    entries = read_entries(file)
    for name, entry in entries.items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            continue
        half = "B" if match["half"] == "A" else "A"
        other = entries.get(f"{match['layer']}{half}{match['suffix']}")
        if other is None:
            raise UserError(f"{file}: {name} has no matrix {half} to go with it. Save the adapter again.")
        if not entry.is_weight_matrix:
            raise UserError(
                f"{file}: {name} is {entry.dtype} {list(entry.shape)}, not a floating-point matrix. "
                "Merge the adapter, then name both models."
            )
        if half == "B":
            yield entry, other


def _plan_checkpoint(aligned: Path, base: Path | None, *, rank: int, coefficient: float) -> Extrapolation:
    files, index = _weight_files(aligned)
    if base is None:
        raise UserError(f"{aligned}: a full model needs the one it was aligned from. Name it with --base.")
    if (base / ADAPTER_CONFIG).is_file():
        raise UserError(f"{base}: an adapter, where {aligned} is a full model. Merge it and name the merged model.")
    entries, origin = _entries(files), _entries(_weight_files(base)[0])
    _check_same_tensors(aligned, entries, base, origin)
    step = partial(_new_weight, rank=rank, coefficient=coefficient)
    rewrites: dict[Path, list[Rewrite]] = {file: [] for file in files}
    for name, entry in entries.items():
        if entry.is_weight_matrix:
            rewrites[entry.file].append(Rewrite(entry, partial(step, entry, origin[name])))
    return Extrapolation(rewrites, index)


def _weight_files(folder: Path) -> tuple[list[Path], Path | None]:
    config = folder / "config.json"
    if config.is_file() and read_json(config).get("quantization_config"):
        raise UserError(f"{config}: the model is quantized. Save it in a floating-point type first.")
    if (folder / MODEL_FILE).is_file():
        return [folder / MODEL_FILE], None
    index = folder / INDEX_FILE
    if not index.is_file():
        raise _no_safetensors(folder, "model")
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or any(Path(str(name)).name != name for name in shards.values()):
        raise UserError(f"{index}: its weight_map does not name files of this folder. Save the model again.")
    return [folder / name for name in sorted(set(shards.values()))], index


def _no_safetensors(folder: Path, stem: str) -> UserError:
    if any(folder.glob("*.bin")):
        return UserError(f"{folder}: has its weights in .bin files. Save it again with safe_serialization=True.")
    return UserError(f"{folder}: has no {stem}.safetensors. Name the folder that training wrote.")


def _entries(files: Iterable[Path]) -> dict[str, Entry]:
    return {name: entry for file in files for name, entry in read_entries(file).items()}


def _check_same_tensors(aligned: Path, ours: dict[str, Entry], base: Path, theirs: dict[str, Entry]) -> None:
    for name in sorted(ours.keys() | theirs.keys()):
        first, second = ours.get(name), theirs.get(name)
        if first is None or second is None:
            lacking = aligned if first is None else base
            raise UserError(f"{lacking}: has no tensor {name}. Name the model that {aligned} was aligned from.")
        if first.shape != second.shape or first.is_weight_matrix != second.is_weight_matrix:
            raise UserError(
                f"{base}: {name} is {second.dtype} {list(second.shape)}, in {aligned} {first.dtype} "
                f"{list(first.shape)}. Name the model that it was aligned from."
            )


def _new_b(a: Entry, b: Entry, *, rank: int, coefficient: float) -> Tensor:
    return extrapolate_factors(a.load(), b.load(), rank=rank, coefficient=coefficient)[1]


def _new_weight(aligned: Entry, base: Entry, *, rank: int, coefficient: float) -> Tensor:
    return extrapolate_weight(aligned.load(), base.load(), rank=rank, coefficient=coefficient)
