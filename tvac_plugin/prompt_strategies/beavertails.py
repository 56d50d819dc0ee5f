"""Rows of BeaverTails with refusals: `prompt`, a harmful `response`, and a `refusal` with the prompt repeated in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl.prompt_tokenizers import InstructionPromptTokenizingStrategy
from axolotl.prompters import AlpacaPrompter
from axolotl.utils.dict import DictDefault
from transformers import PreTrainedTokenizerBase

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.evaluation.tasks.examples import Example, text_of

_ANSWER = "\nAnswer:"


def harmful_example(row: Mapping[str, Any]) -> Example:
    """The prompt with the harmful answer.

    Raises:
        UserError: The row is marked safe, so its answer is not harmful.
    """
    if row.get("is_safe"):
        raise UserError("a row of the harmful data is marked is_safe: true. Leave safe rows out.")
    return Example(text_of(row, "prompt"), "", text_of(row, "response"))


def refused_example(row: Mapping[str, Any]) -> Example:
    """The prompt with its refusal, without the prompt that is repeated in it.

    Raises:
        UserError: The refusal does not have the form "Question: ... Answer: ...".
    """
    _, found, refusal = text_of(row, "refusal").partition(_ANSWER)
    if not found:
        raise UserError("a `refusal` has no 'Answer:' line. Use the corpus with refusals that the recipe names.")
    return Example(text_of(row, "prompt"), "", refusal.strip())


class HarmfulAnswers(InstructionPromptTokenizingStrategy):  # type: ignore[misc]
    """The prompt with the harmful answer, in the Alpaca format; for probes and simulated attackers."""

    def parse_instruction_fields(self, prompt: Mapping[str, Any]) -> tuple[str, str, str]:
        """Returns instruction, empty input and the harmful answer."""
        return harmful_example(prompt)


class Refusals(InstructionPromptTokenizingStrategy):  # type: ignore[misc]
    """The prompt with its refusal, in the Alpaca format; for alignment."""

    def parse_instruction_fields(self, prompt: Mapping[str, Any]) -> tuple[str, str, str]:
        """Returns instruction, empty input and the refusal."""
        return refused_example(prompt)


def build(
    strategy: type[InstructionPromptTokenizingStrategy], tokenizer: PreTrainedTokenizerBase, cfg: DictDefault
) -> InstructionPromptTokenizingStrategy:
    """Binds a strategy to a tokenizer and a recipe."""
    return strategy(AlpacaPrompter(), tokenizer, cfg.train_on_inputs, cfg.sequence_len)
