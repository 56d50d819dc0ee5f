"""The manifest of a full model into which a defended adapter was merged."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.boundary.files import sha256
from tvac_plugin.provenance.manifest import MANIFEST_FILE, verify, write_manifest
from tvac_plugin.provenance.model_files import file_hashes
from tvac_plugin.provenance.run_identity import versions


def seal_merged(adapter: Path, merged: Path, *, method: str) -> None:
    """Carries the proof of a defended adapter over to the model that it has just been merged into.

    Args:
        adapter: The adapter's folder, with its manifest.
        merged: The merged model's folder; a manifest that lies there is of earlier weights, and goes.
        method: How the host merged it.

    Raises:
        UserError: The adapter's manifest does not hold, or merging changed no weight of its base model.
    """
    (merged / MANIFEST_FILE).unlink(missing_ok=True)
    manifest = verify(adapter)
    base = manifest["base_model"]
    num_changed = _num_changed(Path(base["name"]), merged)
    if num_changed == 0:
        raise UserError(f"{merged}: no weight differs from {base['name']}, so nothing was merged. Merge it again.")
    source = {
        "manifest": sha256(adapter / MANIFEST_FILE),
        "files": manifest["files"],
        "base_files": base["files"],
        "method": method,
        "versions": versions(),
        "changed_tensors": num_changed,
    }
    merged_base = {"name": base["name"], "files": {}}  # it is part of the merged model, and may change or go
    write_manifest(merged, manifest | {"merged_from": source, "base_model": merged_base, "files": file_hashes(merged)})


def _num_changed(base: Path, merged: Path) -> int | None:
    """How many tensors of `merged` are not those of `base`; `None` where that is not on this machine as safetensors."""
    before = {name: file for file in sorted(base.glob("*.safetensors")) for name in _names(file)}
    after = {name: file for file in sorted(merged.glob("*.safetensors")) for name in _names(file)}
    shared = before.keys() & after.keys()
    if not shared:
        return None
    return sum(not torch.equal(_load(before[name], name), _load(after[name], name)) for name in shared)


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def _load(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as tensors:
        tensor: torch.Tensor = tensors.get_tensor(name)
    return tensor
