"""`type: tvac_plugin.prompt_strategies.beavertails_refusals`: see `beavertails.Refusals`."""

from __future__ import annotations

from axolotl.utils.dict import DictDefault
from transformers import PreTrainedTokenizerBase

from tvac_plugin.prompt_strategies.beavertails import Refusals, build


def load(tokenizer: PreTrainedTokenizerBase, cfg: DictDefault) -> Refusals:
    """Returns the strategy, as Axolotl asks for it."""
    strategy: Refusals = build(Refusals, tokenizer, cfg)
    return strategy
