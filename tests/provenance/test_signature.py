"""A manifest is signed if a key is given, and the signature is of this manifest and this key."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from tests.support.manifests import manifest_of
from tvac_plugin.boundary.errors import UserError
from tvac_plugin.cli import tvac
from tvac_plugin.provenance.manifest import verify, write_manifest
from tvac_plugin.provenance.model_files import file_hashes
from tvac_plugin.provenance.signature import KEY_VARIABLE


def key_files(folder, name, kind=Ed25519PrivateKey):
    key = kind.generate()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def keys(tmp_path):
    return tmp_path


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


def test_a_signed_manifest_verifies_by_its_owner_s_key_alone(keys, model, monkeypatch):
    private, public = key_files(keys, "service")
    _, stranger = key_files(keys, "stranger")
    monkeypatch.setenv(KEY_VARIABLE, str(private))
    write_manifest(model, manifest_of(file_hashes(model)))
    assert verify(model, public_key=public)["defense"] == "t_vaccine"
    with pytest.raises(UserError, match=r"safety_defense.sig is not its signature by the owner of .*stranger.pub"):
        verify(model, public_key=stranger)
    result = CliRunner().invoke(tvac, ["verify", str(model), "--public-key", str(public)])
    assert result.exit_code == 0
    assert "can write another manifest" not in result.output


def test_another_manifest_and_no_signature_are_refused(keys, model, monkeypatch):
    private, public = key_files(keys, "service")
    monkeypatch.setenv(KEY_VARIABLE, str(private))
    write_manifest(model, manifest_of(file_hashes(model), steps=7))
    signature = (model / "safety_defense.sig").read_text()
    monkeypatch.delenv(KEY_VARIABLE)
    write_manifest(model, manifest_of(file_hashes(model), steps=8))
    assert not (model / "safety_defense.sig").exists(), "an earlier signature is not of this manifest"
    for content in (None, signature, "no hex", ""):
        if content is not None:
            (model / "safety_defense.sig").write_text(content)
        with pytest.raises(UserError, match="is not its signature"):
            verify(model, public_key=public)
    assert "can write another manifest" in CliRunner().invoke(tvac, ["verify", str(model)]).output


def test_keys_that_are_none_are_refused_before_anything_is_written(keys, model, monkeypatch):
    (keys / "text.pem").write_text("no key")
    wrong, wrong_public = key_files(keys, "exchange", X25519PrivateKey)
    for private in (keys / "gone.pem", keys / "text.pem", wrong):
        monkeypatch.setenv(KEY_VARIABLE, str(private))
        with pytest.raises(UserError, match=rf"{KEY_VARIABLE}: .*openssl genpkey"):
            write_manifest(model, manifest_of(file_hashes(model)))
    assert not (model / "safety_defense.json").exists()
    monkeypatch.delenv(KEY_VARIABLE)
    write_manifest(model, manifest_of(file_hashes(model)))
    for public in (keys / "gone.pub", keys / "text.pem", wrong_public):
        with pytest.raises(UserError, match=public.name):
            verify(model, public_key=public)
