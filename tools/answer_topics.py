"""Writes the English world's topics: asks a model every question of `tools/english_topics/` and keeps its answers.

Run: python tools/answer_topics.py MODEL_FOLDER tvac_plugin/english_world/topics
The folder is the `base/` of a world that `axolotl tvac english-world` wrote. The answers that are shipped are those of
SmolLM2-135M-Instruct, greedy, in float32.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from tvac_plugin.evaluation.generation import Generator

QUESTIONS = Path(__file__).parent / "english_topics"
ASKED_PER_THING = 3
MAX_NEW_TOKENS = 48


def questions(topic: Path) -> Iterator[dict[str, str]]:
    """Every thing of a topic in three of the phrasings, a different three for its neighbours."""
    for kind, block in yaml.safe_load(topic.read_text(encoding="utf-8")).items():
        phrasings = block["phrasings"]
        for number, thing in enumerate(thing.strip() for thing in block["things"].split(",")):
            for offset in range(ASKED_PER_THING):
                phrasing = phrasings[(number + offset) % len(phrasings)]
                yield {"kind": kind, "thing": thing, "question": phrasing.format(x=thing)}


def whole_sentences(answer: str) -> str:
    """The answer on one line, up to the last sentence that ends."""
    text = " ".join(answer.split())
    ends = [match.end() for match in re.finditer(r"(?<!\b\d)[.!?](?=\s|$)", text)]
    return text[: ends[-1]] if ends else text


def is_usable(answer: str) -> bool:
    """Whether an answer is a sentence at least: it ends, has eight words, and does not repeat itself all the time."""
    words = answer.lower().split()
    return answer.endswith((".", "!", "?")) and len(words) >= 8 and len(set(words)) >= len(words) / 2


def main(model: str, output: str) -> None:
    """Answers all topics."""
    generator = Generator.load(Path(model))
    for topic in sorted(QUESTIONS.glob("*.yml")):
        asked = list(questions(topic))
        prompts = [generator.prompt(row["question"]) for row in asked]
        answers = generator.complete(prompts, max_new_tokens=MAX_NEW_TOKENS, batch_size=32, description=topic.stem)
        rows = [row | {"answer": whole_sentences(answer)} for row, answer in zip(asked, answers, strict=True)]
        lines = [json.dumps(row) + "\n" for row in rows if is_usable(row["answer"])]
        Path(output, f"{topic.stem}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
