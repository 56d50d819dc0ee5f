"""`type: tvac_plugin.prompt_strategies.ag_news`: AG News as the papers train it, see `examples.ag_news`."""

from __future__ import annotations

from axolotl.utils.dict import DictDefault
from transformers import PreTrainedTokenizerBase

from tvac_plugin.evaluation.tasks.examples import ag_news
from tvac_plugin.prompt_strategies.task import TaskAnswers


def load(tokenizer: PreTrainedTokenizerBase, cfg: DictDefault) -> TaskAnswers:
    """Returns the strategy, as Axolotl asks for it."""
    return TaskAnswers.of(ag_news, tokenizer, cfg)
