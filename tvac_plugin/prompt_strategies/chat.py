"""Rows as one question and its answer in the model's own chat template, for models that were taught to chat."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from axolotl.prompt_strategies.chat_template import load as chat_strategy
from axolotl.prompt_tokenizers import PromptTokenizingStrategy
from axolotl.utils.dict import DictDefault
from transformers import PreTrainedTokenizerBase

from tvac_plugin.evaluation.tasks.examples import Example


class ChatAnswers(PromptTokenizingStrategy):  # type: ignore[misc]
    """A row as a user's message and the assistant's, tokenized by Axolotl's `chat_template`."""

    def __init__(
        self, example_of: Callable[[Mapping[str, Any]], Example], tokenizer: PreTrainedTokenizerBase, cfg: DictDefault
    ) -> None:
        """Binds a corpus to a tokenizer, and to the recipe's `chat_template` and `eot_tokens`."""
        self._chat = chat_strategy(tokenizer, cfg, {})
        super().__init__(self._chat.prompter, tokenizer, cfg.train_on_inputs, cfg.sequence_len)
        self._example_of = example_of

    def tokenize_prompt(self, prompt: Mapping[str, Any]) -> dict[str, list[int]]:
        """Returns token ids and labels; only the answer and the end of its turn are labelled.

        Raises:
            UserError: The row is not one of the corpus.
        """
        example = self._example_of(prompt)
        asked = "\n\n".join(filter(None, (example.instruction, example.input)))
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": example.answer}]
        tokens: dict[str, list[int]] = self._chat.tokenize_prompt({"messages": messages})
        return tokens
