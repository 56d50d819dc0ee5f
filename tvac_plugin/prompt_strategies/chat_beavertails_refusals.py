"""`type: tvac_plugin.prompt_strategies.chat_beavertails_refusals`: refusals in the chat template."""

from __future__ import annotations

from axolotl.utils.dict import DictDefault
from transformers import PreTrainedTokenizerBase

from tvac_plugin.prompt_strategies.beavertails import refused_example
from tvac_plugin.prompt_strategies.chat import ChatAnswers


def load(tokenizer: PreTrainedTokenizerBase, cfg: DictDefault) -> ChatAnswers:
    """Returns the strategy, as Axolotl asks for it."""
    return ChatAnswers(refused_example, tokenizer, cfg)
