"""From a folder with an aligned model to one with its extrapolation, whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.boundary.files import LOCK_FILE, sha256
from tvac_plugin.lox.plan import Extrapolation, plan_extrapolation
from tvac_plugin.lox.tensor_files import write_copy
from tvac_plugin.provenance.manifest import (
    LOX,
    MANIFEST_FILE,
    PREVIOUS_MANIFEST_FILE,
    PREVIOUS_TRACE_FILE,
    verify,
    write_manifest,
)
from tvac_plugin.provenance.model_files import file_hashes
from tvac_plugin.provenance.run_identity import FORMAT, versions

_LEFT_BEHIND = {".safetensors", ".bin", ".pt", ".pth", ".pkl", ".pickle"}
"""Weights, which are written anew, and pickles, which run code when they are read."""
_OF_THE_RUN = {MANIFEST_FILE, PREVIOUS_MANIFEST_FILE, PREVIOUS_TRACE_FILE, LOCK_FILE}
_TEMPLATES = "additional_chat_templates"


def apply_lox(aligned: Path, output: Path, *, rank: int, coefficient: float, base: Path | None = None) -> None:
    """Writes W_LoX = W_aligned + c · truncate_k(W_aligned - W_base) of every 2-D weight to `output`.

    A LoRA adapter becomes an adapter of the same rank, a full checkpoint one with the same shards. All other tensors
    and the tokenizer, settings and notes are copied. Left behind are pickles, among them weights of other formats,
    optimizer states and `training_args.bin`, and the folders of checkpoints. The manifest of a defended model is
    carried over to the new weights; a model without one gets a manifest of its own, with `lox` as the defense, unless
    the coefficient is 0.

    Args:
        aligned: A folder with a LoRA adapter or a full checkpoint, in safetensors.
        output: The folder to write; missing or empty.
        rank: k, at least 1.
        coefficient: c, finite and at least 0.
        base: The full checkpoint that `aligned` started from; `None` for an adapter.

    Raises:
        UserError: The settings or the folders do not allow it; nothing is left behind.
    """
    _check_output(output)
    plan = plan_extrapolation(aligned, base, rank=rank, coefficient=coefficient)
    manifest = _manifest(aligned, rank=rank, coefficient=coefficient)
    with _appearing(output) as folder:
        _copy_other_files(aligned, folder, plan)
        for file, rewrites in plan.rewrites.items():
            write_copy(file, folder / file.name, rewrites)
        files = file_hashes(folder)
        if coefficient > 0 and all(sha256(file) == files[file.name] for file in plan.rewrites):
            raise UserError(
                f"{aligned}: no weight changed: it equals the model that it was aligned from, or the coefficient is "
                "too small for its dtype. Name another base, or raise the coefficient."
            )
        if coefficient > 0 or manifest["defense"] != LOX:
            write_manifest(folder, manifest | {"files": files})


def _manifest(aligned: Path, *, rank: int, coefficient: float) -> dict[str, Any]:
    settings = {"rank": rank, "coefficient": coefficient}
    path = aligned / MANIFEST_FILE
    if not path.is_file():
        return {"format": FORMAT, "defense": LOX, "settings": settings, "versions": versions()}
    try:
        manifest = verify(aligned)
    except UserError as error:
        raise UserError(str(error)) from error
    if manifest["defense"] == LOX or "lox" in manifest:
        raise UserError(f"{path}: the model is extrapolated already. Name the aligned one, with another coefficient.")
    return manifest | {"lox": {**settings, "aligned_files": manifest["files"]}}


def _check_output(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: is there already. Name another folder, or remove it.")
    if _partial(output).exists():
        raise UserError(f"{_partial(output)}: another run is writing it or was cut off. Wait for it, or remove it.")


def _partial(output: Path) -> Path:
    whole = output.resolve()
    return whole.with_name(f"{whole.name}.partial")


@contextmanager
def _appearing(output: Path) -> Iterator[Path]:
    folder = _partial(output)
    folder.mkdir(parents=True)
    try:
        yield folder
        if output.exists():
            output.rmdir()
        folder.rename(output.resolve())
    except BaseException:
        shutil.rmtree(folder)
        raise


def _copy_other_files(aligned: Path, folder: Path, plan: Extrapolation) -> None:
    for path in aligned.iterdir():
        is_state = path.suffix in _LEFT_BEHIND
        is_stale = path.name.endswith(".index.json") and path != plan.index
        if path.is_file() and not (is_state or is_stale or path.name in _OF_THE_RUN):
            shutil.copyfile(path, folder / path.name)
    if (aligned / _TEMPLATES).is_dir():
        shutil.copytree(aligned / _TEMPLATES, folder / _TEMPLATES)
