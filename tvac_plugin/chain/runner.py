"""Runs a plan job by job; what is finished and unchanged is skipped, what fails takes only what depends on it along."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from shutil import rmtree

from filelock import FileLock, Timeout

from tvac_plugin.chain.jobs import Job, Plan, is_defended
from tvac_plugin.chain.state import STATE_FILE, JobState, fingerprint, output_hash, read_state, write_state
from tvac_plugin.files import write_json
from tvac_plugin.provenance import ProvenanceError, verify

RUNNING_FILE = "running.json"
LOG_FILE = "log.txt"


class ChainBusyError(RuntimeError):
    """Another process is running this chain."""


def run_plan(plan: Plan, *, say: Callable[[str], None]) -> dict[str, JobState]:
    """Runs every job that is not finished; returns how each ended.

    Args:
        plan: What to run.
        say: Called with one line about each job.

    Raises:
        ChainBusyError: The chain is already running.
        KeyboardInterrupt: Ctrl-C; the job in flight is stopped and will be run again.
    """
    plan.root.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(plan.root / ".lock", timeout=0):
            states: dict[str, JobState] = {}
            for number, job in enumerate(plan.jobs.values(), start=1):
                counted = partial(_counted, say, f"[{number}/{len(plan.jobs)}]")
                states[job.id] = _settle(job, states, say=counted)
            return states
    except Timeout as error:
        raise ChainBusyError(f"{plan.root}: this chain is already running; wait for it, or stop it") from error


def _counted(say: Callable[[str], None], count: str, text: str) -> None:
    say(f"{count} {text}")


def _settle(job: Job, states: dict[str, JobState], *, say: Callable[[str], None]) -> JobState:
    """Brings one job to an end: skipped, run or blocked."""
    parents = [states[parent] for parent in job.parents]
    _stop_orphans(job)
    if any(parent.status != "finished" for parent in parents):
        failed = next(p for p, s in zip(job.parents, parents, strict=True) if s.status != "finished")
        say(f"{job.id}: blocked, {failed} did not finish")
        return JobState("blocked", "", error=f"{failed} did not finish")
    wanted = fingerprint(job, parents)
    earlier = read_state(job)
    if (
        earlier
        and earlier.status == "finished"
        and earlier.fingerprint == wanted
        and earlier.outputs == output_hash(job)
    ):
        say(f"{job.id}: already done")
        return earlier
    say(f"{job.id}: {' '.join(job.command)}")
    state = _run(job, wanted)
    write_state(job, state)
    say(f"{job.id}: {state.status}{f', {state.error}' if state.error else f', {state.seconds:.0f} s'}")
    return state


def _run(job: Job, wanted: str) -> JobState:
    rmtree(job.output, ignore_errors=True)
    (job.folder / STATE_FILE).unlink(missing_ok=True)
    job.folder.mkdir(parents=True, exist_ok=True)
    job.recipe_file.write_text(job.recipe_text(), encoding="utf-8")
    started = time.monotonic()
    code, peak_memory_mb = _call(job)
    seconds = round(time.monotonic() - started, 1)
    error = _problem(job, code)
    status = "finished" if error is None else "failed"
    return JobState(status, wanted, output_hash(job) if error is None else None, seconds, peak_memory_mb, error)


def _call(job: Job) -> tuple[int, float]:
    """Runs the job's command in its own process group; returns its exit code and peak memory."""
    bin_folder = str(Path(sys.executable).parent)
    environment = {"OMP_NUM_THREADS": str(os.cpu_count() or 1)} | os.environ
    environment["PATH"] = os.pathsep.join([bin_folder, os.environ.get("PATH", "")])
    with (job.folder / LOG_FILE).open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            job.command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
            start_new_session=True,
        )  # fmt: skip
    write_json(job.folder / RUNNING_FILE, {"group": process.pid})
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    finally:
        (job.folder / RUNNING_FILE).unlink(missing_ok=True)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, round(usage.ru_maxrss / 1024, 1)


def _problem(job: Job, code: int) -> str | None:
    """Why the job did not do what its recipe says; `None` when it did."""
    if code != 0:
        return f"exit code {code}: {_last_line(job)} (all of it in {job.folder / LOG_FILE})"
    if output_hash(job) is None:
        return f"it left no result in {job.output}; look at {job.folder / LOG_FILE}"
    if job.kind == "train" and is_defended(job.recipe):
        try:
            verify(job.output, defense=job.recipe["safety_defense"])
        except ProvenanceError as error:
            return str(error)
    if job.kind == "train" and "simulated_user" in job.recipe and not (job.output / "simulated_user.json").is_file():
        return "it did not train on the simulated user's data; is the plugin in `plugins:`?"
    return None


def _last_line(job: Job) -> str:
    lines = (job.folder / LOG_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    telling = [line for line in lines if "Error" in line and "CalledProcessError" not in line and "torchao" not in line]
    return (telling or lines or ["no output"])[-1].strip()[:500]


def _stop_orphans(job: Job) -> None:
    """Stops the processes of a job whose chain was killed."""
    try:
        group = int(json.loads((job.folder / RUNNING_FILE).read_text(encoding="utf-8"))["group"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    for process in Path("/proc").glob("[0-9]*"):
        try:
            is_ours = os.getpgid(int(process.name)) == group
            if is_ours and str(job.folder).encode() in (process / "cmdline").read_bytes():
                os.killpg(group, signal.SIGKILL)
                break
        except OSError:
            continue
    (job.folder / RUNNING_FILE).unlink(missing_ok=True)
