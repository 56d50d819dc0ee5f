"""The model card of a defended model: what was done to it, what was measured, and what that does not promise."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError

from tvac_plugin.boundary.errors import UserError, printable
from tvac_plugin.boundary.files import write_text
from tvac_plugin.provenance.manifest import MANIFEST_FILE, described, verify
from tvac_plugin.provenance.trace import TRACE_FILE
from tvac_plugin.report.markdown import plain_table, plain_text
from tvac_plugin.report.pages import RESULTS_FILE, read_results
from tvac_plugin.report.tables import cell, label, measure_names, note, title
from tvac_plugin.report.verdict import doubts, verdicts

CARD_FILE = "README.md"
_BEGIN, _END = "<!-- tvac-plugin: begin -->", "<!-- tvac-plugin: end -->"
_OURS = re.compile(f"\n*{_BEGIN}.*?{_END}\n*", re.DOTALL)
_TAGS = ["safety", "tamper-resistance", "tvac-plugin"]
_LIMITS = """\
The defense raises the cost of harmful fine-tuning. It delays it and does not stop it: published results say that a high
learning rate, more harmful rows or full access to the weights undo it. It does nothing against prompts that talk a
model round. What was measured holds for the attack and the questions named here and for no others.
"""
_CITATION = """\
```bibtex
@article{liu2024targeted,
  title = {Targeted Vaccine: Safety Alignment for Large Language Models against Harmful Fine-Tuning via Layer-wise
           Perturbation},
  author = {Liu, Guozhi and Lin, Weiwei and Huang, Tiansheng and Mo, Ruichao and Mu, Qi and Shen, Li},
  journal = {arXiv preprint arXiv:2410.09760},
  year = {2024}
}
```
"""


def write_card(model_dir: Path, *, chain_dir: Path | None = None) -> Path:
    """Writes the card of a model that `verify` accepts, or renews our part of the card that is there.

    Args:
        model_dir: A folder with an adapter or a full model, and its manifest.
        chain_dir: `output_dir` of a chain that made and measured this model.

    Returns:
        The path of the card.

    Raises:
        UserError: The model is not verified as defended, or the chain did not make it.
    """
    manifest = verify(model_dir)
    measured = [] if chain_dir is None else _measured(read_results(chain_dir / RESULTS_FILE), manifest, chain_dir)
    path = model_dir / CARD_FILE
    card = _card_at(path)
    known: dict[str, Any] = card.data.to_dict()  # type: ignore[no-untyped-call]
    card.data = ModelCardData(**_metadata(known, manifest, model_dir))
    ours = "\n\n".join([_BEGIN, *_parts(model_dir, manifest, measured), _END])
    text = _OURS.sub("\n\n", card.text).strip()
    write_text(path, f"---\n{card.data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, [text, ours])) + "\n")
    return path


def _card_at(path: Path) -> ModelCard:
    try:
        return ModelCard(path.read_text(encoding="utf-8") if path.is_file() else "---\n{}\n---\n")
    except (ValueError, YAMLError) as error:
        raise UserError(f"{path}: what stands between its first `---` lines is not a mapping. Correct it.") from error


def _metadata(known: Mapping[str, Any], manifest: Mapping[str, Any], model_dir: Path) -> dict[str, Any]:
    """What a hub reads; what the card already says stays."""
    library = "peft" if (model_dir / "adapter_config.json").is_file() else "transformers"
    base = manifest["base_model"].get("name")
    tags = list(dict.fromkeys([*known.get("tags", []), *_TAGS, manifest["defense"]]))
    return {"library_name": library, **({"base_model": base} if base else {}), **known, "tags": tags}


def _parts(model_dir: Path, manifest: dict[str, Any], measured: list[str]) -> Iterator[str]:
    yield f"## Defended with `{manifest['defense']}`"
    yield (
        "tvac-plugin applied this defense, which is meant to make a model harder to turn harmful by fine-tuning. "
        "Whether it did is a matter of what was measured. The manifest says:"
    )
    yield "\n".join(f"- {plain_text(line)}" for line in [*described(manifest).splitlines(), *_layers(model_dir)])
    yield f"Settings:\n\n```json\n{printable(json.dumps(manifest['settings'], indent=2))}\n```"
    yield "## What was measured"
    yield from measured or ["Nothing so far: `axolotl tvac run` measures what an attack does to it."]
    yield f"## Limits\n\n{_LIMITS}"
    yield (
        f"## How to verify\n\nThe hashes of the weights are in `{MANIFEST_FILE}`. "
        "`axolotl tvac verify FOLDER` holds the files against them."
    )
    yield f"## Citation\n\n{_CITATION}" if manifest["defense"] == "t_vaccine" else ""


def _layers(model_dir: Path) -> list[str]:
    """Which layers were drawn how often, most often first, where a trace says so."""
    path = model_dir / TRACE_FILE
    if not path.is_file():
        return []
    try:
        events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise UserError(f"{path}: cut short or damaged. Delete it; the card then leaves the layers out.") from error
    drawn = Counter(layer for event in events if event["event"] == "draw" for layer in event["layers"])
    told = ", ".join(f"{layer} ({times})" for layer, times in drawn.most_common(8))
    return [f"Layers drawn most often, and how often: {told}."] if drawn else []


def _measured(results: Mapping[str, Any], manifest: Mapping[str, Any], chain_dir: Path) -> list[str]:
    """What a chain found out about this model before and after its attack, and about its arm."""
    made = {
        job
        for job, facts in results["jobs"].items()
        if facts.get("safety_defense", {}).get("files") == manifest["files"]
    }
    cells = [found for found in results["cells"] if found["status"] == "finished" and made & {*found["jobs"].values()}]
    if not cells:
        raise UserError(
            f"{chain_dir}: no finished run of this chain made this model. Name the chain that did, or none."
        )
    found = cells[0]
    stage = next(stage for stage, job in found["jobs"].items() if job in made)
    shown = {"before an attack": found["models"].get(stage)} | {
        f"after {name}": found["models"][name]
        for name, role in found["roles"].items()
        if role == "attacked" and name in found["models"]
    }
    rows = {when: measures for when, measures in shown.items() if measures}
    measures = [name for name in measure_names(results) if any(name in entry for entry in rows.values())]
    table = plain_table(
        ["", *map(title, measures)],
        [[when, *(cell(entry[m]) if m in entry else "" for m in measures)] for when, entry in rows.items()],
    )
    notes = sorted({note(m, entry[m]) for entry in rows.values() for m in measures if m in entry})
    run = label({**found, "params": {key: value for key, value in found["params"].items() if key != "seed"}})
    ours = [verdict for verdict in verdicts(results) if f"{verdict.run}, ".startswith(f"{run}, ")]
    words = [verdict.words() for verdict in ours] + doubts(results)
    return ["\n".join(table), "\n".join(f"- {plain_text(line)}" for line in [*notes, *words])]
