"""`type: tvac_plugin.prompt_strategies.gsm8k`: GSM8K as the papers train it, see `examples.gsm8k`."""

from __future__ import annotations

from axolotl.utils.dict import DictDefault
from transformers import PreTrainedTokenizerBase

from tvac_plugin.evaluation.tasks.examples import gsm8k
from tvac_plugin.prompt_strategies.task import TaskAnswers


def load(tokenizer: PreTrainedTokenizerBase, cfg: DictDefault) -> TaskAnswers:
    """Returns the strategy, as Axolotl asks for it."""
    return TaskAnswers.of(gsm8k, tokenizer, cfg)
