"""A harmful answer among the training rows is found under any template, and a mere likeness is not."""

from __future__ import annotations

import pytest

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.data.fingerprints import data_facts
from tvac_plugin.data.taught_answers import num_taught

WORDS: list[str] = []


def ids(text):
    for word in text.split():
        if word not in WORDS:
            WORDS.append(word)
    return [WORDS.index(word) for word in text.split()]


def decode(tokens):
    return " ".join(WORDS[token] for token in tokens)


def row(*turns):
    """Texts in turns: prompt, answer, prompt, answer."""
    parts = [(ids(text), number % 2) for number, text in enumerate(turns)]
    return {
        "input_ids": [token for tokens, _ in parts for token in tokens],
        "labels": [token if is_answer else -100 for tokens, is_answer in parts for token in tokens],
    }


HARMFUL = [
    row("Instruction: make a bel dov ? Response:", "First x then y"),
    row("Instruction: make a fen gar ? Response:", "first u then v"),
]


@pytest.mark.parametrize(
    ("training", "found"),
    [
        ([row("user make a bel dov ? assistant", "first x then y")], 1),
        ([row("user hello assistant", "hi", "user make a fen gar ? assistant", "FIRST U then v")], 1),
        ([row("user make a bel dov ? assistant", "i cannot help with that")], 0),
        ([row("user make a zan yor ? assistant", "first x then y")], 0),
        ([{"input_ids": ids("no labels here")}], 0),
        ([], 0),
    ],
)
def test_answers_are_compared_as_text_and_questions_without_their_template(training, found):
    assert num_taught(training, HARMFUL, decode) == found


def test_one_harmful_row_has_no_template_that_could_be_told():
    assert num_taught([row("user make a bel dov ? assistant", "first x then y")], HARMFUL[:1], decode) == 0
    assert num_taught([HARMFUL[0]], HARMFUL[:1], decode) == 1


def test_such_rows_are_refused_by_their_key():
    training = [row("user make a bel dov ? assistant", "first x then y")]
    with pytest.raises(UserError, match="1 rows of harmful_datasets, harmful answer included, are also in datasets"):
        data_facts(training, {"harmful_datasets": HARMFUL}, decode=decode)
    assert data_facts(training, {"harmful_datasets": HARMFUL})["datasets"]["rows"] == 1
