"""`type: tvac_plugin.prompt_strategies.sst2`: GLUE's SST-2 as the papers train it, see `examples.sst2`."""

from __future__ import annotations

from axolotl.utils.dict import DictDefault
from transformers import PreTrainedTokenizerBase

from tvac_plugin.evaluation.tasks.examples import sst2
from tvac_plugin.prompt_strategies.task import TaskAnswers


def load(tokenizer: PreTrainedTokenizerBase, cfg: DictDefault) -> TaskAnswers:
    """Returns the strategy, as Axolotl asks for it."""
    return TaskAnswers.of(sst2, tokenizer, cfg)
