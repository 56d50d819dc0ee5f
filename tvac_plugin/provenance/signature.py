"""A signature beside a manifest, by which others can tell who wrote it (Ed25519, keys as PEM files of OpenSSL)."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.boundary.files import write_text

KEY_VARIABLE = "TVAC_SIGNING_KEY"
_SUFFIX = ".sig"


def signing_key() -> Ed25519PrivateKey | None:
    """The private key in the file that `TVAC_SIGNING_KEY` names; `None` if it names none.

    Raises:
        UserError: The file holds no such key, or one behind a password.
    """
    name = os.environ.get(KEY_VARIABLE)
    if not name:
        return None
    try:
        key = load_pem_private_key(Path(name).read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{KEY_VARIABLE}: {name} cannot be read as a key: {error}. {_MAKE}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(f"{KEY_VARIABLE}: {name} is not an Ed25519 key. {_MAKE}")
    return key


_MAKE = "Make one with `openssl genpkey -algorithm ed25519 -out key.pem`, without a password."


def sign(file: Path, key: Ed25519PrivateKey | None) -> None:
    """Writes the signature of a file beside it; without a key, removes an earlier one."""
    signature = file.with_suffix(_SUFFIX)
    if key is None:
        signature.unlink(missing_ok=True)
    else:
        write_text(signature, key.sign(file.read_bytes()).hex() + "\n")


def check_signature(file: Path, public_key: Path) -> None:
    """Holds a file against the signature beside it.

    Raises:
        UserError: The key cannot be read, or there is no signature by it of this content.
    """
    try:
        key = load_pem_public_key(public_key.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{public_key}: cannot be read as a public key. Make one with `openssl pkey -in key.pem -pubout`."
        ) from error
    signature = file.with_suffix(_SUFFIX)
    try:
        assert isinstance(key, Ed25519PublicKey)
        key.verify(bytes.fromhex(signature.read_text(encoding="ascii")), file.read_bytes())
    except (AssertionError, OSError, ValueError, InvalidSignature) as error:
        raise UserError(
            f"{file}: {signature.name} is not its signature by the owner of {public_key}. Ask them for the folder anew."
        ) from error
