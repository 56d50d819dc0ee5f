"""Rows of a user's task, trained as they are evaluated, in the Alpaca format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from axolotl.prompt_tokenizers import InstructionPromptTokenizingStrategy
from axolotl.prompters import AlpacaPrompter
from axolotl.utils.dict import DictDefault
from transformers import PreTrainedTokenizerBase

from tvac_plugin.evaluation.tasks.examples import Example


class TaskAnswers(InstructionPromptTokenizingStrategy):  # type: ignore[misc]
    """The task's instruction and input, and its answer."""

    example_of: Callable[[Mapping[str, Any]], Example]

    @classmethod
    def of(
        cls, example_of: Callable[[Mapping[str, Any]], Example], tokenizer: PreTrainedTokenizerBase, cfg: DictDefault
    ) -> TaskAnswers:
        """Binds a task to a tokenizer and a recipe."""
        strategy = cls(AlpacaPrompter(), tokenizer, cfg.train_on_inputs, cfg.sequence_len)
        strategy.example_of = example_of
        return strategy

    def parse_instruction_fields(self, prompt: Mapping[str, Any]) -> tuple[str, str, str]:
        """Returns instruction, input and answer.

        Raises:
            UserError: The row is not one of the task's.
        """
        return self.example_of(prompt)
