"""`type: tvac_plugin.prompt_strategies.decoding_trust_toxic`: harmful rows, see `examples.decoding_trust_toxic`."""

from __future__ import annotations

from axolotl.utils.dict import DictDefault
from transformers import PreTrainedTokenizerBase

from tvac_plugin.evaluation.tasks.examples import decoding_trust_toxic
from tvac_plugin.prompt_strategies.task import TaskAnswers


def load(tokenizer: PreTrainedTokenizerBase, cfg: DictDefault) -> TaskAnswers:
    """Returns the strategy, as Axolotl asks for it."""
    return TaskAnswers.of(decoding_trust_toxic, tokenizer, cfg)
