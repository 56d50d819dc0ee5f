"""The proof that a defense had an effect: a manifest beside the model that it belongs to.

The manifest states what was measured in the run, and names the hash of every file that decides what the model does.
Files that changed since, or that a later undefended run put in their place, no longer match it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from shutil import copyfile
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tvac_plugin.boundary.errors import UserError, explain
from tvac_plugin.boundary.files import write_json
from tvac_plugin.configs.base import DATA_KEYS
from tvac_plugin.provenance.model_files import base_hashes, file_hashes
from tvac_plugin.provenance.run_identity import FORMAT
from tvac_plugin.provenance.settling import LEAST_LOGGED
from tvac_plugin.provenance.signature import KEY_VARIABLE, check_signature, sign, signing_key
from tvac_plugin.provenance.trace import TRACE_FILE

MANIFEST_FILE = "safety_defense.json"
PREVIOUS_MANIFEST_FILE = "safety_defense.previous.json"
PREVIOUS_TRACE_FILE = "safety_trace.previous.jsonl"
MOST_IDLE = 0.1
"""Largest share of measured batches in which a defense may have done nothing."""
LEAST_MOVED = 0.01
"""Smallest share of trained weights that must have moved; below it rounding took the training, and its defense."""
NOT_DEFENDED = "not_defended"
"""The event in a trace with the `reasons` why a run's final model got no manifest."""
LOX = "lox"
"""What stands for a defense in the manifest of a model that was extrapolated and not trained with one."""
_AGAIN = "Train the model again."
_COPY = "Copy it again from where it was made, or train it again."


class _Manifest(BaseModel):
    """What every manifest must say, and what it must not say of a model that is called defended."""

    model_config = ConfigDict(strict=True)

    format: Literal[3]
    defense: str = Field(min_length=1)
    settings: dict[str, Any]
    files: dict[str, str] = Field(min_length=1)
    seed: int | None = None
    base_model: dict[str, Any] = Field(default_factory=dict)
    data: dict[str, Any] = Field(default_factory=dict)
    steps: int = Field(default=0, ge=0)
    defended_steps: int = Field(default=0, ge=0)
    measured_batches: int = Field(default=0, ge=0)
    idle_batches: int = Field(default=0, ge=0)
    moved_tensors: int = Field(default=0, ge=0)
    moved_share: float = Field(default=0.0, ge=0, le=1)
    unsettled: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _refuse_no_effect(self) -> _Manifest:
        is_idle = self.idle_batches > MOST_IDLE * self.measured_batches or not self.measured_batches
        is_still = not self.moved_tensors or self.moved_share < LEAST_MOVED
        did_nothing = is_idle or is_still or not 0 < self.defended_steps <= self.steps
        if self.defense != LOX and did_nothing:
            raise ValueError("it states no effect of a defense.")
        return self


def set_aside(output_dir: Path) -> None:
    """Renames the manifest and copies the trace of a finished run, when another run starts in its folder.

    From then on the folder holds files of both, so nothing may claim to be defended before the new run is done.
    """
    manifest = output_dir / MANIFEST_FILE
    if not manifest.is_file():
        return
    if (output_dir / TRACE_FILE).is_file():
        copyfile(output_dir / TRACE_FILE, output_dir / PREVIOUS_TRACE_FILE)
    manifest.replace(output_dir / PREVIOUS_MANIFEST_FILE)


def write_manifest(model_dir: Path, manifest: dict[str, Any]) -> None:
    """Writes a manifest, and its signature if a key is given.

    Raises:
        UserError: It cannot be written or signed.
    """
    key = signing_key()
    write_json(model_dir / MANIFEST_FILE, manifest)
    sign(model_dir / MANIFEST_FILE, key)


def verify(model_dir: Path, *, defense: str | None = None, public_key: Path | None = None) -> dict[str, Any]:
    """Returns the manifest of `model_dir` after holding it against the files there, and against the base model.

    Args:
        model_dir: A folder with an adapter or a full model.
        defense: The defense that is claimed; `None` accepts any.
        public_key: Of whoever must have signed the manifest; `None` asks for no signature.

    Raises:
        UserError: There is no manifest, it is not signed as asked, states no effect or is for another defense, or the
            files of the model or of its base model are not the ones it names.
    """
    path = model_dir / MANIFEST_FILE
    if not model_dir.is_dir():
        raise UserError(f"{model_dir}: no such folder. Name the `output_dir` of a training run.")
    if not path.is_file():
        raise UserError(f"{path}: not found, so nothing shows that this model was defended. {_way_out(path)}")
    if public_key is not None:
        check_signature(path, public_key)
    manifest = _read(path)
    if defense is not None and manifest["defense"] != defense:
        raise UserError(f"{path}: the model was trained with {manifest['defense']}, not {defense}. Correct the recipe.")
    different = _different(manifest["files"], file_hashes(model_dir))
    if different:
        raise UserError(f"{path}: {', '.join(different)} in this folder: not what was defended. {_COPY}")
    base = manifest.get("base_model", {})
    now = base_hashes(base["name"]) if base.get("name") else {}
    if now and base["files"] and now != base["files"]:
        raise UserError(
            f"{path}: the base model {base['name']} is another one than was defended: "
            f"{', '.join(_different(base['files'], now))}. Put it back, or train the model again."
        )
    return manifest


def described(manifest: dict[str, Any]) -> str:
    """What a verified manifest says, in a few lines."""
    if manifest["defense"] == LOX:
        return f"{LOX}, settings {manifest['settings']}, of a model without a defense."
    unsettled = manifest.get("unsettled", [])
    lines = [
        f"{manifest['defense']}: {share_defended(manifest)}",
        f"{manifest['moved_tensors']} of {manifest.get('trained_tensors', 'all')} trained tensors, and "
        f"{manifest['moved_share']:.0%} of all trained weights, differ from what they were before; seed "
        f"{manifest['seed']}.",
        *([f"Its losses had not settled: {'; '.join(unsettled)}."] if unsettled else []),
        f"base model: {manifest['base_model'].get('name') or 'unknown'}",
        *(["The adapter that was defended is merged into it."] if "merged_from" in manifest else []),
        *(
            f"{key}: {manifest['data'][key]['rows']} rows"
            for key in ("datasets", *DATA_KEYS)
            if key in manifest["data"]
        ),
    ]
    return "\n".join(lines)


def share_defended(manifest: Mapping[str, Any]) -> str:
    """In how many of the measured batches the defense did something, and how many it may have missed."""
    idle, measured = manifest["idle_batches"], manifest["measured_batches"]
    missed = f"it did nothing in {idle} ({idle / measured:.1%}); at most {MOST_IDLE:.0%} may be so" if idle else "all"
    return (
        f"{measured - idle} of {measured} batches defended ({missed}), in {manifest['defended_steps']} of "
        f"{manifest['steps']} steps."
    )


def not_known(manifest: dict[str, Any], *, is_signed: bool = False) -> list[str]:
    """What `verify` cannot tell of a model with this manifest, one sentence each."""
    base = manifest.get("base_model", {})
    notes = []
    if "merged_from" in manifest:
        notes.append("The adapter and the merging are taken from the manifest alone: they are not looked at again.")
    elif not base.get("files"):
        notes.append("The base model was not recorded file by file, so it could not be compared.")
    elif not base_hashes(base["name"]):
        notes.append(f"The base model {base['name']} is not on this machine, so it could not be compared.")
    if "settled" in manifest and manifest["settled"] is None:
        notes.append(
            f"Fewer than {LEAST_LOGGED} losses were logged, too few to tell whether they had settled. Lower "
            "`logging_steps:`, or train longer."
        )
    if not is_signed:
        notes.append(
            f"Whoever can write to this folder can write another manifest; {KEY_VARIABLE} signs it, and --public-key "
            "checks the signature."
        )
    return [*notes, "This shows how the model was trained, not that it is safe: `axolotl tvac evaluate` measures that."]


def _read(path: Path) -> dict[str, Any]:
    try:
        manifest = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not a manifest: damaged, or written by something else. {_COPY}") from error
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path}: of another version of tvac-plugin, whose claims cannot be checked here. {_AGAIN}")
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        raise UserError(f"{path}: not of a defended model: {'; '.join(explain(error))} {_AGAIN}") from error
    return manifest


def _different(then: dict[str, str], now: dict[str, str]) -> list[str]:
    return [
        *(f"{name} changed" for name in then if name in now and now[name] != then[name]),
        *(f"{name} is missing" for name in then if name not in now),
        *(f"{name} is new" for name in now if name not in then),
    ]


def _way_out(manifest: Path) -> str:
    if manifest.with_name(PREVIOUS_MANIFEST_FILE).is_file():
        return (
            f"A later run started here and did not finish; the manifest of the one before is {PREVIOUS_MANIFEST_FILE}. "
            "Resume the later run, or give the earlier manifest its name back if no other file here was changed."
        )
    if manifest.with_name(TRACE_FILE).is_file():
        reasons = _why_not_sealed(manifest.with_name(TRACE_FILE))
        if reasons:
            return f"A defended run ended here, but {reasons}. Look at the losses in {TRACE_FILE}, and train again."
        return (
            "A defended run started here and did not finish, or its defense did nothing: look at the end of "
            f"{TRACE_FILE}. Resume it with auto_resume_from_checkpoints, or train again."
        )
    return "Train it with `safety_defense:` on; `axolotl tvac check RECIPE` tells whether it will be."


def _why_not_sealed(trace: Path) -> str:
    """What the run wrote last, if that is why its model is not defended; empty if not."""
    try:
        last = json.loads(trace.read_text(encoding="utf-8").splitlines()[-1])
        return "; ".join(last["reasons"]) if last["event"] == NOT_DEFENDED else ""
    except (OSError, ValueError, IndexError, KeyError, TypeError):
        return ""
