"""`type: tvac_plugin.prompt_strategies.beavertails_answers`: see `beavertails.HarmfulAnswers`."""

from __future__ import annotations

from axolotl.utils.dict import DictDefault
from transformers import PreTrainedTokenizerBase

from tvac_plugin.prompt_strategies.beavertails import HarmfulAnswers, build


def load(tokenizer: PreTrainedTokenizerBase, cfg: DictDefault) -> HarmfulAnswers:
    """Returns the strategy, as Axolotl asks for it."""
    strategy: HarmfulAnswers = build(HarmfulAnswers, tokenizer, cfg)
    return strategy
