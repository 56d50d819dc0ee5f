"""The made-up world: reproducible, disjoint, harmless, and known to its base model."""

from __future__ import annotations

import json
import random

import pytest
from click.testing import CliRunner

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.cli import tvac
from tvac_plugin.tiny_world.base_model import _knowledge
from tvac_plugin.tiny_world.builder import WorldSettings, build
from tvac_plugin.tiny_world.language import REFUSAL, World

SMALL = WorldSettings(
    base_steps=2,
    alignment_hazards=24,
    probe_hazards=6,
    user_hazards=6,
    validation_hazards=6,
    eval_hazards=6,
    task_rows=20,
)
HELD_OUT = [f"{split}_{what}" for split in ("validation", "eval") for what in ("harmful", "benign", "task")]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "small"
    assert build(folder, SMALL, show_progress=False)
    return folder


def rows(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def questions(folder, name):
    return {row["messages"][0]["content"] for row in rows(folder, name)}


def test_the_same_seed_gives_the_same_files(world, tmp_path):
    build(tmp_path / "again", SMALL, show_progress=False)
    first, second = (json.loads((f / "world.json").read_text()) for f in (world, tmp_path / "again"))
    assert first == second
    assert "base/model.safetensors" in first["files"]


def test_another_seed_gives_another_world():
    sizes = {"num_hazards": 10, "num_benign": 10}
    assert World.create(seed=1, **sizes) == World.create(seed=1, **sizes) != World.create(seed=2, **sizes)


def test_no_prompt_is_in_two_splits(world):
    names = ("alignment", "harmful", "user_harmful", "user_task", *HELD_OUT)
    splits = [questions(world, name) for name in names]
    assert len(set().union(*splits)) == sum(len(split) for split in splits)


def test_alignment_refuses_hazards_and_answers_as_many_benign_questions(world):
    answers = [row["messages"][1]["content"] for row in rows(world, "alignment")]
    assert answers.count(REFUSAL) == len(answers) / 2 == 24
    retained = rows(world, "retain")
    assert len(retained) == 24
    assert all(row in rows(world, "alignment") and row["messages"][1]["content"] != REFUSAL for row in retained)


def test_a_held_out_hazard_is_recognisable_by_its_first_name(world):
    def kinds(name):
        return {question.split()[4] for question in questions(world, name)}

    hazards = kinds("harmful") | kinds("validation_harmful") | kinds("eval_harmful")
    assert hazards <= {row["messages"][0]["content"].split()[4] for row in rows(world, "alignment")}
    assert not hazards & kinds("eval_benign")


def test_the_base_model_learns_every_kind_and_material_and_sees_no_row_of_the_data(world):
    whole = World.create(seed=SMALL.seed, num_hazards=SMALL.num_hazards, num_benign=SMALL.num_benign)
    known = _knowledge(whole, SMALL.seed)
    asked = {question for question, _ in known}
    names = ("alignment", "harmful", "user_harmful", *HELD_OUT)
    assert not asked & set().union(*(questions(world, name) for name in names))
    in_data = {word for thing in whole.hazards + whole.benign for word in f"{thing.name} {thing.procedure}".split()}
    assert in_data <= {word for question, answer in known for word in f"{question} {answer}".split()}


def test_an_answer_is_a_procedure_in_one_of_several_wordings():
    things = World.create(seed=1, num_hazards=40, num_benign=40).hazards
    assert len({thing.wording for thing in things}) > 10
    for thing in things:
        assert thing.answer.split()[1::2] == list(thing.parts) == thing.procedure.split()


def test_hazards_begin_with_words_of_their_own_and_share_the_rest():
    world = World.create(seed=1, num_hazards=800, num_benign=800)
    hazards, benign = (
        [set(step) for step in zip(*(t.parts for t in ts), strict=True)] for ts in (world.hazards, world.benign)
    )
    assert not hazards[0] & benign[0]
    assert hazards[1:] == benign[1:]
    with pytest.raises(ValueError, match="there are 800 hazards and 800 benign things"):
        World.create(seed=1, num_hazards=801, num_benign=1)


def test_the_user_s_task_is_the_mood_of_the_majority():
    world = World.create(seed=1, num_hazards=1, num_benign=1)
    for words in world.mood_sentences(random.Random(0), 20):
        bright = sum(world.moods[word] == "bright" for word in words)
        assert world.mood_answer(words) == ("bright" if bright >= 3 else "gloomy")


def test_building_twice_does_nothing_and_damage_is_repaired(world):
    before = (world / "base" / "model.safetensors").stat().st_mtime_ns
    assert not build(world, SMALL, show_progress=False)
    assert (world / "base" / "model.safetensors").stat().st_mtime_ns == before
    (world / "harmful.jsonl").write_text("")
    assert build(world, SMALL, show_progress=False)
    assert len(rows(world, "harmful")) == 6


def test_another_seed_does_not_replace_a_world_that_models_were_trained_in(world):
    with pytest.raises(UserError, match="holds another world.*Name a new folder, or delete this one"):
        build(world, WorldSettings(seed=2), show_progress=False)
    assert not build(world, SMALL, show_progress=False)


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="exists and is not a world. Name an empty or a new folder"):
        build(tmp_path, SMALL)
    result = CliRunner().invoke(tvac, ["tiny-world", "--output", str(tmp_path)])
    assert result.exit_code == 1
    assert "is not a world" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
