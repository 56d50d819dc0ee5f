"""A merged model has a manifest of its own, if the adapter's holds and merging changed the weights."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from safetensors.torch import load_file, save_file

from tests.support.workspace import axolotl_train
from tvac_plugin.boundary.errors import UserError
from tvac_plugin.plugin import SafetyDefensePlugin
from tvac_plugin.provenance.manifest import MANIFEST_FILE, described, not_known, verify
from tvac_plugin.provenance.merged import seal_merged
from tvac_plugin.trainers.merging import merge_adapter

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def made(workspace, tmp_path_factory):
    """A recipe, its defended adapter, and the model that it was merged into."""
    folder = tmp_path_factory.mktemp("merged")
    recipe = workspace.recipe(folder / "out")
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe))
    adapter = axolotl_train(recipe)
    merged = merge_adapter(folder / "recipe.yml", None)
    return workspace.root / "base", adapter, merged


@pytest.fixture
def adapter(made, tmp_path):
    return shutil.copytree(made[1], tmp_path / "adapter")


@pytest.fixture
def merged(made, tmp_path):
    return shutil.copytree(made[2], tmp_path / "merged")


def test_a_merged_model_tells_what_it_is_made_of(made):
    _, adapter, merged = made
    manifest = verify(merged, defense="t_vaccine")
    source = manifest["merged_from"]
    assert source["files"] == json.loads((adapter / MANIFEST_FILE).read_text())["files"]
    assert source["method"] == "memory_efficient"
    learnt = [name for name, value in load_file(adapter / "adapter_model.safetensors").items() if value.any()]
    assert source["changed_tensors"] == sum("lora_B" in name for name in learnt) > 0
    assert manifest["files"].keys() >= {WEIGHTS, "config.json"}
    assert "merged into it" in described(manifest)
    assert "The adapter and the merging are taken from the manifest alone" in not_known(manifest)[0]


def test_other_weights_under_its_manifest_are_noticed(made, merged):
    base, _, _ = made
    shutil.copy(base / WEIGHTS, merged)
    with pytest.raises(UserError, match="model.safetensors changed"):
        verify(merged)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", MANIFEST_FILE])
def test_an_adapter_that_is_not_shown_to_be_defended_hands_nothing_on(adapter, merged, file):
    path = adapter / file
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="train it again"):
        seal_merged(adapter, merged, method="legacy")
    assert not (merged / MANIFEST_FILE).exists()


def test_a_merge_that_changed_nothing_is_none(made, adapter, merged):
    save_file(load_file(made[0] / WEIGHTS), merged / WEIGHTS, metadata={"format": "pt", "by": "another"})
    with pytest.raises(UserError, match="no weight differs from .*, so nothing was merged. Merge it again"):
        seal_merged(adapter, merged, method="legacy")
    assert not (merged / MANIFEST_FILE).exists()


def test_the_hook_leaves_undefended_adapters_alone(adapter, merged):
    from axolotl.utils.dict import DictDefault

    for folder in (adapter, merged):
        (folder / MANIFEST_FILE).unlink()
    SafetyDefensePlugin().post_lora_merge(DictDefault({}), str(adapter), str(merged))
    assert not (merged / MANIFEST_FILE).exists()
