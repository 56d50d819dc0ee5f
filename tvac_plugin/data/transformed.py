"""A user's harmful rows with their prompts rewritten, before any prompt strategy sees them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.configs.prompt_transform import PromptTransform
from tvac_plugin.data.entries import loaded_rows
from tvac_plugin.data.row_checks import chat_names, fields_of

_OF_THE_SOURCE = ("split", "name", "data_files", "revision", "shards", "shards_idx")
_ASKS, _ANSWERS = ("user", "human"), ("assistant", "gpt", "model")
Rewrite = Callable[[str], str]


def transformed_entries(
    entries: Sequence[Mapping[str, Any]], transform: PromptTransform, folder: Path
) -> list[dict[str, Any]]:
    """Writes the rows of each entry, rewritten and in their order, to a file in `folder`; returns entries that read it.

    Raises:
        UserError: Which part of a row is its prompt is not known.
    """
    found = []
    for number, entry in enumerate(entries):
        path = folder / f"transformed_{number}.jsonl"
        rows = (_transformed(row.value, entry, transform) for row in loaded_rows(entry, default_split="train"))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        kept = {key: value for key, value in entry.items() if key not in _OF_THE_SOURCE}
        found.append(kept | {"path": str(path), "ds_type": "json"})
    return found


def _transformed(row: Mapping[str, Any], entry: Mapping[str, Any], transform: PromptTransform) -> dict[str, Any]:
    if entry.get("type") == "chat_template":
        return _chat(row, entry, transform)
    fields = fields_of(entry, train_on_inputs=False)
    if not (fields.prompts and fields.answers):
        raise UserError(
            f"simulated_user.prompt_transform: of `type: {entry.get('type')}` it is not known which part of a row is "
            "the prompt. Write the harmful rows as conversations, `type: chat_template`."
        )
    prompt, answer = fields.prompts[0], fields.answers[0]
    if missing := [name for name in (prompt, answer) if name not in row]:
        raise UserError(
            f"simulated_user.prompt_transform: a harmful row has no `{missing[0]}`, which `type: {entry.get('type')}` "
            "reads. Write it, or correct `type:`."
        )
    return {**row, prompt: transform.asked(str(row[prompt])), answer: transform.answered(str(row[answer]))}


def _chat(row: Mapping[str, Any], entry: Mapping[str, Any], transform: PromptTransform) -> dict[str, Any]:
    """The last question of a conversation is rewritten, and the last answer."""
    field, role, content = chat_names(entry)
    said: Any = row.get(field)
    is_talk = isinstance(said, list) and all(isinstance(message, Mapping) for message in said)
    messages = [dict(message) for message in said] if is_talk else []
    for roles, rewrite in ((_ASKS, transform.asked), (_ANSWERS, transform.answered)):
        last = next((message for message in reversed(messages) if message.get(role) in roles), None)
        if last is None or not isinstance(last.get(content), str):
            raise UserError(
                "simulated_user.prompt_transform: a harmful row has no question or no answer that is a text. Write "
                f"`{field}:` as a list of {_ASKS[0]} and {_ANSWERS[0]} messages."
            )
        last[content] = rewrite(last[content])
    return {**row, field: messages}
