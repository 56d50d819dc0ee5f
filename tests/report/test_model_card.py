"""A model card says what was done to a model, what was measured, and not more."""

from __future__ import annotations

import json

import pytest
import yaml

from tests.report.test_pages import NONE, VACCINE, cell_of, rated, results_of
from tests.support.manifests import manifest_of
from tvac_plugin.boundary.errors import UserError
from tvac_plugin.provenance.manifest import write_manifest
from tvac_plugin.provenance.model_files import file_hashes
from tvac_plugin.report.model_card import write_card


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "adapter_config.json").write_text("{}")
    write_manifest(folder, manifest_of(file_hashes(folder), base_model={"name": "org/base", "files": {}}))
    return folder


def read(path):
    _, metadata, body = path.read_text().split("---\n", 2)
    return yaml.safe_load(metadata), body


def test_a_card_has_what_a_hub_reads_and_what_the_manifest_says(model):
    (model / "safety_trace.jsonl").write_text(
        "".join(json.dumps({"event": "draw", "layers": layers}) + "\n" for layers in ([1, 4], [4, 7]))
    )
    metadata, body = read(write_card(model))
    assert (metadata["library_name"], metadata["base_model"]) == ("peft", "org/base")
    assert {"safety", "t_vaccine", "tvac-plugin"} <= {*metadata["tags"]}
    assert "## Defended with `t_vaccine`" in body
    assert "7 of 7 batches defended (all), in 7 of 7 steps." in body
    assert "Layers drawn most often, and how often: 4 (2), 1 (1), 7 (1)." in body
    assert "Nothing so far" in body
    assert "does not stop it" in body
    assert "2410.09760" in body


def test_what_a_card_said_before_stays_and_ours_is_renewed(model):
    (model / "README.md").write_text("---\nlicense: apache-2.0\ntags:\n- mine\n---\n\n# My model\n\nIts story.\n")
    once = write_card(model).read_text()
    metadata, body = read(write_card(model))
    assert once == (model / "README.md").read_text()
    assert (metadata["license"], metadata["tags"][0]) == ("apache-2.0", "mine")
    assert body.startswith("\n# My model\n\nIts story.\n")
    assert body.count("## Defended with") == 1


def test_a_card_promises_nothing_that_was_not_measured(model):
    body = write_card(model).read_text()
    assert "meant to make a model harder to turn" in body
    assert "made this model harder" not in body


@pytest.mark.parametrize(
    ("name", "content"),
    [("README.md", "---\n- a\n- b\n---\n"), ("README.md", "---\na: [\n---\n"), ("safety_trace.jsonl", "{")],
)
def test_a_damaged_file_is_named_and_kept(model, name, content):
    (model / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name}: .*(Correct it|Delete it)"):
        write_card(model)
    assert (model / name).read_text() == content


@pytest.mark.parametrize("change", ["weights", "manifest"])
def test_no_card_is_written_for_a_model_that_is_not_verified(model, change):
    if change == "weights":
        (model / "adapter_model.safetensors").write_bytes(b"others")
    else:
        (model / "safety_defense.json").unlink()
    with pytest.raises(UserError, match="safety_defense.json"):
        write_card(model)
    assert not (model / "README.md").exists()


def chain_of(model, folder):
    """Results of a chain whose second cell made the model."""
    cells = [cell_of(NONE, 80.0), cell_of(VACCINE, 20.0), cell_of({"safety_defense": "random_noise"}, 70.0)]
    for cell, name in zip(cells, ("plain", "ours", "other"), strict=True):
        cell["jobs"] = {"align": name}
        cell["models"] = {"align": {"harmful_score": rated(0.0)}, **cell["models"]}
        cell["roles"]["align"] = "aligned"
    manifest = json.loads((model / "safety_defense.json").read_text())
    facts = {"status": "finished", "stage": "align", "recipe": {}}
    results = results_of(*cells) | {
        "jobs": {"plain": facts, "other": facts, "ours": facts | {"safety_defense": manifest}}
    }
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_a_card_has_the_scores_of_the_chain_that_made_the_model(model, tmp_path):
    _, body = read(write_card(model, chain_dir=chain_of(model, tmp_path / "chain")))
    assert "|  | harmful score % |" in body
    assert "| before an attack | 0.0 (0.0 to 5.0, n = 60, 2 unscored) |" in body
    assert "| after attack | 20.0 (15.0 to 25.0, n = 60, 2 unscored) |" in body
    assert "vaccine: Less harm at equal steps." in body
    assert "One seed" in body
    assert "random_noise" not in body


def test_the_scores_of_another_model_are_refused(model, tmp_path):
    chain = chain_of(model, tmp_path / "chain")
    (model / "adapter_model.safetensors").write_bytes(b"trained again")
    write_manifest(model, manifest_of(file_hashes(model)))
    with pytest.raises(UserError, match="no finished run of this chain made this model"):
        write_card(model, chain_dir=chain)
