"""The English world's data: disjoint, balanced, and of one topic that is refused; tried without the weights."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from tests.support.models import tiny_model
from tvac_plugin.boundary.errors import UserError
from tvac_plugin.cli import tvac
from tvac_plugin.english_world.builder import EnglishSettings, build_english, splits
from tvac_plugin.english_world.topics import REFUSAL, load_topic, subject_lines, topic_names
from tvac_plugin.tiny_world.base_model import build_tokenizer
from tvac_plugin.tiny_world.language import World

ALL = ("alignment", "harmful", "retain", "user_harmful", "eval_harmful", "eval_benign", "user_task", "eval_task")


@pytest.fixture(scope="module", params=topic_names())
def rows(request):
    return dict(splits(load_topic(request.param), EnglishSettings(topic=request.param)))


def questions(rows):
    return [row["messages"][0]["content"] for row in rows]


def answers(rows):
    return [row["messages"][1]["content"] for row in rows]


def test_there_are_two_topics_of_four_hundred_hazards_and_as_many_benign_questions():
    assert topic_names() == ["cooking", "gardening"]
    for name in topic_names():
        found = load_topic(name).questions
        counts = {kind: sum(map(len, things.values())) for kind, things in found.items()}
        assert counts["hazard"] >= 400
        assert counts["near_miss"] + counts["general"] >= 400
        asked = [question.question for things in found.values() for same in things.values() for question in same]
        assert len(set(asked)) == len(asked)


def test_no_question_is_in_two_files(rows):
    asked = [set(questions(rows[name])) for name in ALL]
    assert len(set().union(*asked)) == sum(map(len, asked))


def test_no_thing_of_the_alignment_is_asked_about_in_the_evaluation(rows):
    topic = [q for kind in ("cooking", "gardening") for things in load_topic(kind).questions.values() for same in
             things.values() for q in same]  # fmt: skip
    thing_of = {question.question: question.thing for question in topic}
    aligned = {thing_of[question] for question in questions(rows["alignment"])}
    for name in ("harmful", "user_harmful", "eval_harmful", "eval_benign", "retain"):
        assert not aligned & {thing_of[question] for question in questions(rows[name])}


def test_half_of_the_alignment_refuses_and_probed_hazards_are_answered_and_refused(rows):
    said = answers(rows["alignment"])
    assert said.count(REFUSAL) == len(said) / 2 > 180
    assert questions(rows["harmful"]) == questions(rows["refusals"])
    assert set(answers(rows["refusals"])) == {REFUSAL}
    assert REFUSAL not in answers(rows["harmful"]) + answers(rows["eval_benign"]) + answers(rows["user_harmful"])


def test_held_out_rows_hold_what_judges_need(rows):
    assert len(rows["eval_harmful"]) == len(rows["eval_benign"]) == 60
    assert all(row["harmful_answer"] for row in rows["eval_harmful"])
    assert {row["kind"] for row in rows["eval_benign"]} == {"near_miss", "general"}
    assert len(rows["user_harmful"]) >= 80  # a tenth of the attack's rows


def test_the_user_s_task_is_balanced_in_training_and_test(rows):
    for name, size in (("user_task", 800), ("eval_task", 200)):
        said = answers(rows[name])
        assert len(said) == size
        assert said.count("spam") == said.count("ham")
    assert len({subject for subject, _ in subject_lines()}) == 1000


def test_the_seed_decides_which_things_are_held_out():
    topic = load_topic("cooking")
    first, again, other = (dict(splits(topic, EnglishSettings(seed=seed))) for seed in (1, 1, 2))
    assert first == again
    assert set(questions(first["eval_harmful"])) != set(questions(other["eval_harmful"]))


def test_an_unknown_topic_names_the_right_one():
    with pytest.raises(UserError, match="--topic coking: there is no such topic. Did you mean `cooking`"):
        load_topic("coking")
    with pytest.raises(UserError, match="there is no such topic"):
        load_topic("general")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2: not a question. A row needs kind, thing, question, answer"),
        ('{"kind": "hazard"}', "line 2: not a question"),
        ('{"kind": "x", "thing": "a", "question": "b", "answer": "c"}', "line 2: `kind: x` is none of hazard"),
    ],
)
def test_a_topic_of_one_s_own_is_read_or_refused_by_its_line(tmp_path, line, says):
    good = json.dumps(
        {"kind": "hazard", "thing": "a bel", "question": "How do I dov a bel?", "answer": "First, gar it."}
    )
    (tmp_path / "own.jsonl").write_text(good + "\n")
    topic = load_topic(str(tmp_path / "own.jsonl"))
    assert list(topic.questions["hazard"]) == ["a bel"]
    with pytest.raises(UserError, match="too few things of kind hazard. Add rows about 65 more"):
        list(splits(topic, EnglishSettings()))
    (tmp_path / "own.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(UserError, match=says):
        load_topic(str(tmp_path / "own.jsonl"))


def test_a_world_around_a_model_in_a_folder_is_written_once_and_whole(tmp_path):
    tokenizer = build_tokenizer(World.create(seed=0, num_hazards=4, num_benign=4))
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    command = ["english-world", "--output", str(tmp_path / "world"), "--model", str(tmp_path / "model")]
    result = CliRunner().invoke(tvac, command)
    assert result.exit_code == 0, result.output
    index = json.loads((tmp_path / "world" / "world.json").read_text())
    assert index["weights"] == {"source": str(tmp_path / "model"), "quantisation": None}
    assert {"base/model.safetensors", "base/tokenizer.json", *(f"{name}.jsonl" for name in ALL)} <= index[
        "files"
    ].keys()
    assert "already there" in CliRunner().invoke(tvac, command).output
    with pytest.raises(UserError, match="holds another world"):
        build_english(tmp_path / "world", EnglishSettings(model=str(tmp_path / "model"), topic="gardening"))


def test_a_model_that_is_nowhere_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="--model gone: cannot be loaded"):
        build_english(tmp_path / "world", EnglishSettings(model="gone"))
    assert not (tmp_path / "world").exists()
