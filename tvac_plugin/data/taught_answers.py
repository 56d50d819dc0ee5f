"""Harmful answers among the rows that a model is trained on, whatever template either was put into."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby, takewhile
from typing import Any

Rows = Iterable[Mapping[str, Any]]
Decode = Callable[[list[int]], str]
Words = tuple[str, ...]
_IGNORED = -100


def decoding(tokenizer: Any) -> Decode:
    """The text of token ids without special tokens, as `tokenizer` gives it."""
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))


def num_taught(training: Rows, harmful: Rows, decode: Decode) -> int:
    """How many harmful answers are taught as the answer to the same question.

    Answers are compared word by word. Of a harmful prompt, the words at both ends that all harmful prompts share are
    left out as their template; the rest must be somewhere in the prompt of the training row.

    Args:
        training: Tokenized rows with `labels`.
        harmful: The same.
        decode: Text of token ids, without special tokens.
    """
    asked: dict[Words, list[str]] = defaultdict(list)
    for prompt, answer in _exchanges(training, decode):
        asked[answer].append(_spaced(prompt))
    exchanges = list(_exchanges(harmful, decode))
    questions = _without_template([prompt for prompt, _ in exchanges])
    return sum(
        any(_spaced(question) in prompt for prompt in asked.get(answer, ()))
        for question, (_, answer) in zip(questions, exchanges, strict=True)
    )


def _exchanges(rows: Rows, decode: Decode) -> Iterator[tuple[Words, Words]]:
    """Every run of tokens with labels, and all that comes before it."""
    for row in rows:
        ids, labels = list(row["input_ids"]), list(row.get("labels") or [])
        start = 0
        for is_answer, run in groupby(labels, key=lambda label: label != _IGNORED):
            end = start + len(list(run))
            answer = _words(decode(ids[start:end])) if is_answer else ()
            if answer:
                yield _words(decode(ids[:start])), answer
            start = end


def _without_template(prompts: Sequence[Words]) -> list[Words]:
    if len(set(prompts)) < 2:
        return list(prompts)
    begin = _num_shared(prompts)
    rest = [prompt[begin:] for prompt in prompts]
    end = _num_shared([words[::-1] for words in rest])
    return [words[: len(words) - end] for words in rest]


def _num_shared(prompts: Iterable[Words]) -> int:
    """How many words all of `prompts` begin with."""
    return sum(1 for _ in takewhile(lambda words: len(set(words)) == 1, zip(*prompts, strict=False)))


def _words(text: str) -> Words:
    return tuple(text.lower().split())


def _spaced(words: Words) -> str:
    return f" {' '.join(words)} "
