"""What a job left is looked at before it counts as done."""

from __future__ import annotations

import json

import pytest

from tests.chain import fake
from tests.chain.conftest import started, timeless
from tvac_plugin.boundary.errors import UserError


@pytest.mark.parametrize("damage", ["data", "output", "state"])
def test_damage_is_noticed(chain, tmp_path, damage):
    (tmp_path / "alignment.jsonl").write_text("a")
    path = chain()
    first, before = fake.run(path), started(tmp_path / "out")
    job = tmp_path / "out" / "jobs" / "align-safety_defense=none"
    if damage == "data":
        (tmp_path / "alignment.jsonl").write_text("b")
    elif damage == "output":
        (job / "out" / "adapter_model.safetensors").write_bytes(b"swapped")
    else:
        (job / "stage.json").write_text('{"status": "finis')
    assert timeless(fake.run(path))["summary"] == timeless(first)["summary"]
    assert started(tmp_path / "out")[job.name] != before[job.name]


RECORDS = [
    "attack-safety_defense=none/out/safety_trace.jsonl",
    "attack-safety_defense=none/out/checkpoint-20/trainer_state.json",
    "judge.attack-safety_defense=none/out/answers/attack.harmful_score.jsonl",
]


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_that_was_cut_short_is_made_again_and_what_follows_is_not(chain, tmp_path, name):
    path = chain()
    first, before = fake.run(path), started(tmp_path / "out")
    record = tmp_path / "out" / "jobs" / name
    record.write_bytes(record.read_bytes()[:-5])
    assert timeless(fake.run(path)) == timeless(first)
    again = {job for job, time in started(tmp_path / "out").items() if before[job] != time}
    assert again == {name.partition("/")[0]}


@pytest.mark.parametrize("name", RECORDS)
def test_a_cut_record_of_a_job_of_an_earlier_version_is_named(chain, tmp_path, name):
    path = chain()
    fake.run(path)
    for state in tmp_path.glob("out/jobs/*/stage.json"):
        facts = json.loads(state.read_text())
        del facts["records"]
        state.write_text(json.dumps(facts))
    before = started(tmp_path / "out")
    fake.run(path)
    assert started(tmp_path / "out") == before
    record = tmp_path / "out" / "jobs" / name
    record.write_bytes(record.read_bytes()[:-5])
    with pytest.raises(UserError, match=f"{record}: cut short or damaged. Delete this job's folder below `jobs/`"):
        fake.run(path)
