"""The recipes that ask the models, and that run everything."""

from __future__ import annotations

from typing import Any

from tvac_plugin.starter.draft import ALIGN, ATTACK, CHAIN, EVALUATE, Draft, comment, yaml_lines

_READS_REFUSALS = ("answers", "procedure", "qwen3_guard", "wildguard")
"""Judges that tell a refusal themselves; beside the others `keyword` does."""


def evaluate_text(draft: Draft) -> str:
    """What the models are asked, and who reads the answers."""
    material, judge = draft.material, draft.judge
    refusing = judge if judge in _READS_REFUSALS else "keyword"
    parts: dict[str, Any] = {"harmful_score": {"judge": judge, "prompts": {"path": draft.data("eval_harmful")}}}
    notes = [
        f"- `{judge}` reads the answers; docs/reference/metrics.md has the other judges. `keyword` finds refusals "
        "by their phrases."
    ]
    benign = _benign_prompts(draft)
    if benign is None:
        notes.append("- Benign questions are missing: give a local JSON Lines file as data, or add over_refusal: here.")
    else:
        parts["over_refusal"] = {"judge": refusing, "prompts": benign}
    if material.asked:
        notes.append("- Held-out rows whose answer refuses are not asked as benign ones.")
    if material.asked and draft.base_can_answer:
        parts["retention"] = {"prompts": {"path": draft.data("eval_benign")}}
        notes.append(
            "- retention: loss on held-out rows of your data, against the model before training. Below 1 it learnt."
        )
    if material.has_short_answers:
        name = "eval_task" if material.task else "eval_benign"
        parts["accuracy"] = {"task": {"prompts": {"path": draft.data(name)}, "max_new_tokens": 32}}
    else:
        notes.append(
            "- How well the user's task is learnt is not measured: its answers are too long to compare word for word, "
            "or were not read. Add `accuracy:`, as {task: {task: tvac_gsm8k}}, and the report also compares harm "
            "where the task is learnt equally well."
        )
    head = ["What the models of the chain answer, on rows that nothing is trained on.",
            f"Run:       axolotl tvac run {draft.path(CHAIN)}", "Assumed:", *notes]  # fmt: skip
    parts |= {"prompt_format": material.form, "batch_size": 16, "output_dir": f"{draft.output}-evaluation"}
    return comment(head) + "\n" + yaml_lines(parts, by=0)


def _benign_prompts(draft: Draft) -> dict[str, Any] | None:
    if draft.material.asked:
        return {"path": draft.data("eval_benign")}
    entry = draft.slices("asked")[0]
    source = {"path": entry["path"], "split": entry["split"], "num_prompts": 200}
    if entry.get("name"):
        source["subset"] = entry["name"]
    if draft.material.form == "alpaca":
        return source | {"field": "instruction", "only": {"input": ""}}
    is_plain = not entry.get("field_messages") and not entry.get("message_property_mappings")
    return source if is_plain else None


def chain_text(draft: Draft) -> str:
    """The stages, with and without the defense."""
    models = ["base", "align", "attack"] if draft.base_can_answer else ["align", "attack"]
    is_silent = ["Assumed:", "- The base model is not asked: its tokenizer has no chat template."]
    head = [
        f"Does T-Vaccine help {draft.recipe.name}? Trains it with and without, lets a simulated user fine-tune "
        "both models, and asks all of them.",
        f"Run:       axolotl tvac run {draft.path(CHAIN)} --dry-run   (prints every command)",
        f"           axolotl tvac run {draft.path(CHAIN)}   (the same command continues a stopped run)",
        *([] if draft.base_can_answer else is_silent),
    ]
    return (
        comment(head) + "\nstages:\n"
        f"  - {{name: align, train: {ALIGN}}}\n"
        f"  - {{name: attack, train: {ATTACK}, model_from: align}}\n"
        f"  - {{name: judge, evaluate: {EVALUATE}, models: [{', '.join(models)}], checkpoints: true}}\n"
        "matrix:\n  safety_defense: [none, t_vaccine]   # `seed: [1, 2, 3]` beside it tells a defense from luck\n"
        + yaml_lines({"output_dir": f"{draft.output}-chain"}, by=0)
    )
