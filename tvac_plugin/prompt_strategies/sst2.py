"""`type: tvac_plugin.prompt_strategies.sst2`: GLUE's SST-2 as the papers' generation task, in the Alpaca format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl.prompt_tokenizers import InstructionPromptTokenizingStrategy
from axolotl.utils.dict import DictDefault
from transformers import PreTrainedTokenizerBase

from tvac_plugin.evaluation.tasks.scoring import SST2_LABELS
from tvac_plugin.prompt_strategies.beavertails import build, text_of

INSTRUCTION = "Analyze the sentiment of the input, and respond only positive or negative."


class SentimentAnswers(InstructionPromptTokenizingStrategy):  # type: ignore[misc]
    """The papers' instruction, the sentence as input, and the class as answer."""

    def parse_instruction_fields(self, prompt: Mapping[str, Any]) -> tuple[str, str, str]:
        """Returns instruction, sentence and class.

        Raises:
            ValueError: The row has no label; GLUE's test split has none.
        """
        if prompt["label"] not in (0, 1):
            raise ValueError("a row of SST-2 has no label. Use split train or validation.")
        return INSTRUCTION, text_of(prompt, "sentence"), SST2_LABELS[prompt["label"]]


def load(tokenizer: PreTrainedTokenizerBase, cfg: DictDefault) -> SentimentAnswers:
    """Returns the strategy, as Axolotl asks for it."""
    strategy: SentimentAnswers = build(SentimentAnswers, tokenizer, cfg)
    return strategy
