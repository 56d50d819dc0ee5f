"""Safetensors files, one tensor at a time: what is in them, and copies in which some tensors have new values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tvac_plugin.boundary.errors import UserError

FLOATING = {"F64", "F32", "F16", "BF16"}
"""The floating-point types of weights that are not quantized, as safetensors names them."""


class Entry(NamedTuple):
    """Where a tensor is.

    Attributes:
        file: The file it is in.
        name: Its name there.
        dtype: Its type, as safetensors names it.
        shape: Its shape.
        start: Its first byte in the file.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def is_weight_matrix(self) -> bool:
        """Whether it is 2-D and floating-point."""
        return len(self.shape) == 2 and self.dtype in FLOATING

    def load(self) -> Tensor:
        """Reads the tensor."""
        with safe_open(self.file, framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(self.name)
        return tensor


class Rewrite(NamedTuple):
    """A tensor that gets a new value.

    Attributes:
        entry: Where it is in the file that is copied.
        compute: Gives the value, in the same shape and dtype.
    """

    entry: Entry
    compute: Callable[[], Tensor]


def read_entries(file: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file by name.

    Raises:
        UserError: The file is missing or damaged.
    """
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: cannot be read as safetensors: {error}. Save the model again.") from error
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    return {
        name: Entry(file, name, facts["dtype"], tuple(facts["shape"]), 8 + size + facts["data_offsets"][0])
        for name, facts in header.items()
    }


def write_copy(source: Path, target: Path, rewrites: Iterable[Rewrite]) -> None:
    """Copies a safetensors file and puts new values in place: header, layout and metadata stay the same.

    Raises:
        UserError: A value cannot be computed.
    """
    shutil.copyfile(source, target)
    with target.open("r+b") as stream:
        for entry, compute in rewrites:
            try:
                value = compute()
            except UserError as error:
                raise UserError(f"{source}: {entry.name}: {error}") from error
            stream.seek(entry.start)
            stream.write(value.contiguous().view(torch.uint8).numpy().data)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        UserError: The file holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}. Save the model again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object. Save the model again.")
    return value
