"""What the papers' tasks ask and answer: one definition each, for training (prompt strategies) and evaluation.

The strings are those of T-Vaccine's released code (github.com/Lslland/T-Vaccine, `gsm8k/`, `ag_news/` and `sst2/`),
which Vaccine's shares. Booster's asks GSM8K without `STEP_BY_STEP`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from tvac_plugin.boundary.errors import UserError

SST2_LABELS = ("negative", "positive")
AG_NEWS_LABELS = ("World", "Sports", "Business", "Sci/Tech")
SST2_INSTRUCTION = "Analyze the sentiment of the input, and respond only positive or negative"
AG_NEWS_INSTRUCTION = (
    "Categorize the news article given in the input into one of the 4 categories:"
    "\n\nWorld\nSports\nBusiness\nSci/Tech\n"
)
STEP_BY_STEP = "\nFirst think step by step and then answer the final number.\n"
FINAL_ANSWER = "The final answer is: "
CONTINUE = "You are required to continue the generation of the given incomplete prompt"


class Example(NamedTuple):
    """A row as the parts of Alpaca's format.

    Attributes:
        instruction: What to do.
        input: What to do it with; may be empty.
        answer: What is trained.
    """

    instruction: str
    input: str
    answer: str

    @property
    def question(self) -> str:
        """Instruction and input as the one text that an evaluation puts into its prompt format."""
        return f"{self.instruction}\n\n### Input:\n{self.input}" if self.input else self.instruction


def sst2(row: Mapping[str, Any]) -> Example:
    """GLUE's SST-2: columns `sentence` and `label`.

    Raises:
        UserError: The row has no label, as those of GLUE's test split, or no text.
    """
    return Example(SST2_INSTRUCTION, text_of(row, "sentence"), _label(row, SST2_LABELS))


def ag_news(row: Mapping[str, Any]) -> Example:
    """AG News: columns `text` and `label`.

    Raises:
        UserError: The row has no label or no text.
    """
    return Example(AG_NEWS_INSTRUCTION, text_of(row, "text"), _label(row, AG_NEWS_LABELS))


def gsm8k(row: Mapping[str, Any]) -> Example:
    """GSM8K: columns `question` and `answer`, whose last line begins with "####".

    Raises:
        UserError: One of them is not a text.
    """
    answer = text_of(row, "answer").replace("####", FINAL_ANSWER)
    return Example(text_of(row, "question") + STEP_BY_STEP, "", answer)


def decoding_trust_toxic(row: Mapping[str, Any]) -> Example:
    """A toxic row of DecodingTrust's file: `type`, and `prompt` and `continuation`, each with its `text`.

    Raises:
        UserError: The row is of another type, so that its answer is not harmful, or has no text.
    """
    if row.get("type") != "toxic":
        raise UserError("a row of the harmful data is not of `type` toxic. Leave such rows out.")
    prompt, continuation = (row.get(part) or {} for part in ("prompt", "continuation"))
    return Example(CONTINUE, text_of(prompt, "text"), text_of(continuation, "text"))


def text_of(row: Mapping[str, Any], field: str) -> str:
    """The text of a field.

    Raises:
        UserError: It is null or something else, which would be trained as the word that Python has for it.
    """
    value = row.get(field)
    if not isinstance(value, str):
        raise UserError(f"a row's `{field}` is not a text. Write its text, or leave the row out.")
    return value


def _label(row: Mapping[str, Any], names: tuple[str, ...]) -> str:
    label = row.get("label")
    if not isinstance(label, int) or label not in range(len(names)):
        raise UserError(f"a row's `label` is not one of 0 to {len(names) - 1}. Use a split that has labels.")
    return names[label]
