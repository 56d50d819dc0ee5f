"""`type: tvac_plugin.prompt_strategies.chat_alpaca`: Alpaca's rows in the chat template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl.utils.dict import DictDefault
from transformers import PreTrainedTokenizerBase

from tvac_plugin.evaluation.tasks.examples import Example, text_of
from tvac_plugin.prompt_strategies.chat import ChatAnswers


def load(tokenizer: PreTrainedTokenizerBase, cfg: DictDefault) -> ChatAnswers:
    """Returns the strategy, as Axolotl asks for it."""
    return ChatAnswers(alpaca_example, tokenizer, cfg)


def alpaca_example(row: Mapping[str, Any]) -> Example:
    """Columns `instruction`, `input`, which may be empty, and `output`.

    Raises:
        UserError: One of them is not a text.
    """
    asked = text_of(row, "input") if row.get("input") else ""
    return Example(text_of(row, "instruction"), asked, text_of(row, "output"))
