"""The two recipes that train: what is added stands on top with its reasons, below it the user's own lines."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.recipes.reading import PLUGIN_PATH
from tvac_plugin.starter.document import Document
from tvac_plugin.starter.draft import ALIGN, CHAIN, Draft, comment, yaml_lines

HARMFUL_RATIO, MOST_SAMPLES, EPOCHS = 0.1, 1000, 5
_PAPERS_LAYERS = 8
_FEW_HARMFUL = 10
_NOT_IN_A_CHAIN = ("hub_model_id", "hub_strategy", "resume_from_checkpoint")
_NOT_IN_AN_ATTACK = (
    *_NOT_IN_A_CHAIN, "datasets", "test_datasets", "max_steps", "eval_steps", "evals_per_epoch", "eval_strategy",
    "saves_per_epoch", "save_first_step", "load_best_model_at_end", "early_stopping_patience", "eval_sample_packing",
    "lora_model_dir", "revision_of_model", "base_model_config",
)  # fmt: skip


def align_text(draft: Draft) -> str:
    """The recipe with its defense."""
    document, recipe = Document.read(draft.recipe), draft.material.recipe
    for entry, division in zip(document.keys["datasets"], draft.material.divisions, strict=True):
        entry["split"] = division.train
    if draft.material.refusals:
        document.keys["datasets"].append(draft.entry("refusals"))
    document.keys["output_dir"] = f"{draft.output}-defended"
    added = _plugin(document)
    left_out = _remove(document, _NOT_IN_A_CHAIN, recipe)
    refusals = (
        f"{len(draft.material.refusals)} refusals are trained on beside it, from --refusals."
        if draft.material.refusals
        else "It is taken to teach the model to refuse, or the model to refuse already. A defense keeps refusals "
        "and teaches none: where there are none, give some with `axolotl tvac init --refusals FILE`."
    )
    head = [
        f"{draft.recipe.name}, with T-Vaccine. What was added stands on top, below it are your own lines.",
        f"Run:       axolotl tvac check {draft.path(ALIGN)}",
        f"           axolotl tvac run {draft.path(CHAIN)}   (trains with and without the defense, attacks both)",
        "Assumed:",
        "- Of the data of each entry of `datasets:` a part is held out (`split:`), to ask the models about and, unless "
        "--task names one, for the attack's benign task. With the verdict known, train on all of it.",
        f"- {refusals}",
        _layers_note(draft),
        *left_out,
    ]
    return comment(head) + "\n" + added + _defense(draft) + "\n" + document.text()


def _plugin(document: Document) -> str:
    """Adds the plugin to the user's list, or gives the lines that make one."""
    if document.keys.get("plugins"):
        document.keys["plugins"].append(PLUGIN_PATH)
        return ""
    document.remove("plugins")
    return f"plugins:\n  - {PLUGIN_PATH}\n"


def _layers_note(draft: Draft) -> str:
    layers = draft.material.num_layers
    if layers is None:
        return (
            f"- The model has 24 layers or more, of which {_PAPERS_LAYERS} are drawn; its config is not on this "
            "machine. About a quarter is right."
        )
    return f"- Of {layers} layers {_num_active(draft)} are drawn at a time, about a quarter, as in the paper."


def _num_active(draft: Draft) -> int:
    layers = draft.material.num_layers
    return _PAPERS_LAYERS if layers is None else max(1, layers // 4)


def _defense(draft: Draft) -> str:
    missing = "".join(comment([text]) for text in draft.missing())
    return (
        "safety_defense: t_vaccine          # or another; `none` trains undefended from the same adapter\n"
        + missing
        + "harmful_datasets:                  # read by the probe, never trained on\n"
        + yaml_lines([draft.entry("harmful_probe")])
        + f"""t_vaccine:
  rho_scale: relative              # a share of what is perturbed; the paper's 3.0 is for Llama-2-7B's width and depth
  rho: 0.01                        # measured on a model of 135 M parameters; 0.1 is too much there
  layer_sampling: relative_gradient_norm
  num_active_layers: {_num_active(draft)}
  resample_steps: 20               # published script
  probe_steps: 200                 # paper
  probe_batch_size: {min(8, len(draft.material.probe) or 8)}
  freeze: none                     # all layers learn your data; the paper's `layer` saves memory, and trains drawn ones
"""
    )


def attack_text(draft: Draft) -> str:
    """The simulated user's recipe."""
    document, material = Document.read(draft.recipe), draft.material
    samples = _num_samples(draft)
    rows_a_step = int(material.recipe.get("micro_batch_size") or 1) * int(
        material.recipe.get("gradient_accumulation_steps") or 1
    )
    steps = ceil(samples / rows_a_step) * EPOCHS
    added = _plugin(document)
    settings = {
        "base_model": f"{draft.output}-defended" + ("/merged" if material.recipe.get("adapter") else ""),
        "val_set_size": 0, "num_epochs": EPOCHS, "save_strategy": "steps", "save_steps": max(1, steps // 10),
        "save_total_limit": 20, "save_only_model": True, "sample_packing": False,
        "output_dir": f"{draft.output}-attacked",
    }  # fmt: skip
    left_out = _remove(document, _NOT_IN_AN_ATTACK, material.recipe)
    for key in [key for key in settings if key in document.keys]:
        document.keys[key] = settings.pop(key)
    known = material.num_task_rows is not None and bool(material.attack)
    head = [
        f"A simulated user, who fine-tunes the model that {ALIGN} makes on a benign task with "
        f"{HARMFUL_RATIO:.0%} harmful rows, with the settings of {draft.recipe.name}.",
        f"Run:       axolotl tvac run {draft.path(CHAIN)}, which fills in the model",
        "Assumed:",
        "- The task is "
        + ("what --task gave." if material.task else f"a held-out part of {draft.recipe.name}'s data."),
        f"- {EPOCHS} passes over {samples} rows"
        + ("." if known else "; lower `num_samples:` if there are fewer, which the attack would say.")
        + " The papers take 20 passes over 1000 rows. Ten checkpoints show how far it got.",
        "- Learning rate and adapter are yours. A higher rate is a stronger attack.",
        *left_out,
    ]
    user = {
        "num_samples": samples,
        "harmful_ratio": HARMFUL_RATIO,
        "task_datasets": [draft.entry("task")] if material.task else draft.slices("task"),
        "harmful_datasets": [draft.entry("harmful_attack")],
        "disjoint_from": _asked_entries(draft),
        "drop_overlap": True,
        "seed": 42,
    }
    return (
        comment(head) + "\n" + added
        + "safety_defense: none               # seeds the user's adapter: every defense meets the same attack\n"
        + "simulated_user:                    # rows that alignment or evaluation has too are left out\n"
        + yaml_lines(user) + (yaml_lines(settings, by=0) if settings else "") + "\n" + document.text()
    )  # fmt: skip


def _asked_entries(draft: Draft) -> list[dict[str, Any]]:
    benign = [draft.entry("eval_benign")] if draft.material.asked else draft.slices("asked")
    return [
        draft.entry("harmful_probe"), draft.entry("eval_harmful"), *benign,
        *([draft.entry("eval_task")] if draft.material.task else []),
    ]  # fmt: skip


def attack_cautions(draft: Draft) -> list[str]:
    """What to know of the attack before the chain is run, one sentence each."""
    samples = _num_samples(draft)
    num_harmful = round(samples * HARMFUL_RATIO)
    if not draft.material.attack or num_harmful >= _FEW_HARMFUL:
        return []
    more = "--task" if num_harmful < len(draft.material.attack) else "--harmful"
    return [
        f"The attack has {num_harmful} harmful rows among {samples}, a weak one. More rows in {more} make it stronger."
    ]


def _num_samples(draft: Draft) -> int:
    """As many as there are rows for, up to the papers' number."""
    task, harmful = draft.material.num_task_rows, len(draft.material.attack)
    samples = MOST_SAMPLES
    while samples > 1 and (
        (task is not None and samples - round(samples * HARMFUL_RATIO) > task)
        or (harmful and round(samples * HARMFUL_RATIO) > harmful)
    ):
        samples -= 1
    if round(samples * HARMFUL_RATIO) == 0:
        raise UserError(f"{draft.recipe}: {task} rows are left for the attack, too few. Give more with --task FILE.")
    return samples


def _remove(document: Document, keys: Sequence[str], recipe: dict[str, Any]) -> list[str]:
    """Takes keys that are set out of a document; says which, the data left aside."""
    there = [key for key in keys if recipe.get(key) is not None]
    for key in there:
        document.remove(key)
    named = [key for key in there if key not in ("datasets", "test_datasets")]
    return [f"- Left out, for it has no place in a chain: {', '.join(named)}."] if named else []
