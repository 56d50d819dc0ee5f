"""Several jobs at a time: they overlap, fail alone, and are stopped and run again together."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.chain import fake
from tests.chain.conftest import started, timeless
from tvac_plugin.cli import tvac

DIAMOND = {"matrix": {"harmful_ratio": [0.0, 0.1]}}


def start(path, num_parallel, **environment):
    return subprocess.Popen(
        [sys.executable, fake.__file__, "chain", str(path), str(num_parallel)], cwd=path.parent,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])} | environment,
    )  # fmt: skip


def is_running(group):
    for process in Path("/proc").glob("[0-9]*"):
        try:
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
            if os.getpgid(int(process.name)) == group and state != "Z":
                return True
        except OSError:
            continue
    return False


def wait_until(condition, what):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def test_jobs_that_need_the_same_one_run_together(chain, tmp_path):
    lines = []
    path = chain(attack={"meet": str(tmp_path / "meet")}, **DIAMOND)
    results = fake.run(path, num_parallel=2, say=lines.append)
    assert [cell["status"] for cell in results["cells"]] == ["finished", "finished"]
    numbers = {job: f"[{number}/8]" for number, job in enumerate(fake.fake_plan(path).jobs, start=1)}
    assert len(lines) == 16
    assert all(line.split(" ")[0] == numbers[line.split(" ")[1].rstrip(":")] for line in lines)


def test_several_at_a_time_give_what_one_at_a_time_gives(chain, tmp_path):
    path = chain()
    one, two = (
        json.dumps(timeless(fake.run(path, [f"output_dir={tmp_path / name}"], num_parallel=count)))
        for name, count in (("a", 1), ("b", 3))
    )
    one, two = (json.loads(text.replace(str(tmp_path / name), "D")) for text, name in ((one, "a"), (two, "b")))
    assert list(one["jobs"]) == list(two["jobs"])
    assert (one["cells"], one["summary"]) == (two["cells"], two["summary"])
    before = started(tmp_path / "b")
    fake.run(path, [f"output_dir={tmp_path / 'b'}"], num_parallel=2)
    assert started(tmp_path / "b") == before


def test_one_at_a_time_keeps_the_order_of_the_plan(chain):
    lines = []
    fake.run(chain(**DIAMOND), say=lines.append)
    assert [line.split(" ")[0] for line in lines] == [f"[{number}/8]" for number in range(1, 9) for _ in range(2)]


def test_several_at_a_time_begin_with_what_most_waits_for(chain):
    path = chain(matrix={"safety_defense": ["none", "t_vaccine"]})
    lines = []
    fake.run(path, num_parallel=2, say=lines.append)
    first = [line.split(" ")[1] for line in lines[:2]]
    assert first == ["align-safety_defense=none:", "align-safety_defense=t_vaccine:"]


def test_a_failure_blocks_only_what_depends_on_it(chain):
    lines = []
    results = fake.run(chain(matrix={"align.fail": [True, False]}), num_parallel=2, say=lines.append)
    assert [cell["status"] for cell in results["cells"]] == ["failed", "finished"]
    ended = [results["jobs"][job]["status"] for job in results["jobs"] if job.endswith("fail=True")]
    assert ended == ["failed", "blocked", "blocked", "blocked"]
    assert sum("blocked, " in line for line in lines) == 4, "and the merge"


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, None), (signal.SIGTERM, None)]
)
def test_what_was_stopped_runs_again(chain, tmp_path, number, exit_code):
    path = chain()
    expected = fake.run(path, [f"output_dir={tmp_path / 'whole'}"])["summary"]
    process = start(path, 2, FAKE_HANGS="1")
    wait_until(lambda: len(groups(tmp_path)) == 2, "two jobs do not start")
    running = groups(tmp_path)
    process.send_signal(number)
    assert process.wait(30) == exit_code or exit_code is None
    assert [is_running(group) for group in running] == [number == signal.SIGKILL] * 2
    assert not list(tmp_path.glob("out/jobs/*/stage.json"))
    assert fake.run(path, num_parallel=2)["summary"] == expected
    assert not any(is_running(group) for group in running)
    assert groups(tmp_path) == []


def groups(folder):
    notes = []
    for path in folder.glob("out/jobs/*/running.json"):
        try:
            notes.append(json.loads(path.read_text())["group"])
        except FileNotFoundError:
            continue
    return notes


def test_an_error_of_the_chain_itself_stops_what_runs(chain, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_HANGS", "1")
    said = []

    def say(line):
        said.append(line)
        if len(said) == 3:
            assert len(groups(tmp_path)) == 2
            raise OSError("the terminal is gone")

    with pytest.raises(OSError, match="terminal"):
        fake.run(chain(matrix={"seed": [1, 2, 3]}, stages=[{"name": "align", "train": "align.yml"}]), (), 3, say)
    assert groups(tmp_path) == []


@pytest.mark.parametrize(("given", "num_parallel", "expected"), [(None, 1, 8), (None, 3, 2), (None, 9, 1), ("5", 3, 5)])
def test_jobs_share_the_cores(chain, tmp_path, monkeypatch, given, num_parallel, expected):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS")
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    fake.run(chain(matrix={}, stages=[{"name": "align", "train": "align.yml"}]), num_parallel=num_parallel)
    assert (tmp_path / "out" / "jobs" / "align" / "log.txt").read_text() == f"threads {expected}\n"


def test_a_recipe_may_say_how_many_threads_a_job_has(chain, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    fake.run(chain(matrix={}, stages=[{"name": "align", "train": "align.yml"}], threads_per_job=3), num_parallel=1)
    assert (tmp_path / "out" / "jobs" / "align" / "log.txt").read_text() == "threads 3\n"


def test_the_command_passes_the_number_on_and_refuses_none(chain, monkeypatch):
    asked = {}
    monkeypatch.setattr("tvac_plugin.chain.runner.run_plan", lambda plan, **options: asked.update(options) or 1 / 0)
    CliRunner().invoke(tvac, ["run", str(chain()), "--jobs", "3"])
    assert asked["num_parallel"] == 3
    assert "uses all visible GPUs" in " ".join(CliRunner().invoke(tvac, ["run", "--help"]).output.split())
    assert CliRunner().invoke(tvac, ["run", str(chain()), "--jobs", "0"]).exit_code == 2


@pytest.mark.slow
@pytest.mark.parametrize("num_parallel", [1, 2])
def test_ten_kills_change_nothing(chain, tmp_path, num_parallel):
    path = chain()
    expected = timeless(fake.run(path, ["output_dir=" + str(tmp_path / "whole")]))
    rng = random.Random(0)
    for num_finished in range(10):
        process = start(path, num_parallel)
        wait_until(
            lambda count=num_finished: len(list(tmp_path.glob("out/jobs/*/stage.json"))) >= count,
            "the chain does not go on after a kill",
        )
        time.sleep(rng.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.wait()
    found = timeless(fake.run(path))
    text, other = (json.dumps(r).replace(str(tmp_path / d), "D") for r, d in ((found, "out"), (expected, "whole")))
    found, expected = json.loads(text), json.loads(other)
    for results in (found, expected):
        for job in results["jobs"].values():
            job.pop("outputs")
    assert found == expected
