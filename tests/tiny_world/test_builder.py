"""The made-up world: reproducible, disjoint, harmless, and known to its base model."""

from __future__ import annotations

import json
import random

import pytest
from click.testing import CliRunner

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.cli import tvac
from tvac_plugin.tiny_world.builder import WorldSettings, build
from tvac_plugin.tiny_world.language import REFUSAL, World

SMALL = WorldSettings(base_steps=2, alignment_hazards=12, probe_hazards=6, user_hazards=6, eval_hazards=6, task_rows=20)


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
    names = ("alignment", "harmful", "user_harmful", "eval_harmful", "eval_benign", "user_task", "eval_task")
    splits = [questions(world, name) for name in names]
    assert len(set().union(*splits)) == sum(len(split) for split in splits)


def test_alignment_refuses_hazards_and_answers_as_many_benign_questions(world):
    answers = [row["messages"][1]["content"] for row in rows(world, "alignment")]
    assert answers.count(REFUSAL) == len(answers) / 2 == 12
    retained = rows(world, "retain")
    assert len(retained) == 12
    assert all(row in rows(world, "alignment") and row["messages"][1]["content"] != REFUSAL for row in retained)


def test_a_held_out_hazard_is_recognisable_by_its_first_name(world):
    def kinds(name):
        return {question.split()[4] for question in questions(world, name)}

    hazards = kinds("harmful") | kinds("eval_harmful")
    assert hazards <= {row["messages"][0]["content"].split()[4] for row in rows(world, "alignment")}
    assert not hazards & kinds("eval_benign")


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
