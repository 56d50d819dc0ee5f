"""Runs a plan, some jobs at a time; what is done is skipped, what fails takes only what depends on it along."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Mapping
from shutil import rmtree
from typing import NamedTuple

from filelock import FileLock, Timeout

from tvac_plugin.boundary.errors import UserError, printable
from tvac_plugin.chain.jobs import PREPARED_FOLDER, ChainPlan, Job, is_defended
from tvac_plugin.chain.process import LOG_FILE, Ended, JobProcess, stop_orphans, terminated_as_interrupted
from tvac_plugin.chain.progress import progress
from tvac_plugin.chain.state import (
    STATE_FILE,
    JobState,
    fingerprint,
    output_hash,
    read_state,
    records_hash,
    still_counts,
    write_state,
)
from tvac_plugin.provenance.manifest import verify

_POLL_SECONDS = 0.05
_TELL_SECONDS = 30.0


def run_plan(plan: ChainPlan, *, say: Callable[[str], None], num_parallel: int = 1) -> dict[str, JobState]:
    """Runs every job that is not finished; returns how each ended, in the plan's order.

    Args:
        plan: What to run.
        say: Called with one line when a job begins and ends, and every half minute about how far it is.
        num_parallel: How many jobs may run at a time, each as soon as those before it are done.

    Raises:
        UserError: The chain is already running.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the jobs in flight are stopped and run again next time, as after any
            exception.
    """
    plan.root.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(plan.root / ".lock", timeout=0):
            stop_orphans(plan.root)
            with terminated_as_interrupted():
                return _Run(plan, say, num_parallel).finish()
    except Timeout as error:
        raise UserError(f"{plan.root}: this chain is already running. Wait for it, or stop it.") from error


class _Started(NamedTuple):
    process: JobProcess
    fingerprint: str


class _Run:
    """Which jobs of a plan wait, run and have ended; one thread looks after all."""

    def __init__(self, plan: ChainPlan, say: Callable[[str], None], num_parallel: int) -> None:
        self._jobs = plan.jobs
        self._numbers = {job: number for number, job in enumerate(plan.jobs, start=1)}
        self._say_line = say
        self._num_parallel = num_parallel
        self._threads = plan.chain.recipe.threads_per_job or max(1, (os.cpu_count() or 1) // num_parallel)
        self._waiting = list(plan.jobs) if num_parallel == 1 else _longest_first(plan.jobs)
        self._running: dict[str, _Started] = {}
        self._states: dict[str, JobState] = {}
        self._told = time.monotonic()

    def finish(self) -> dict[str, JobState]:
        try:
            while self._waiting or self._running:
                self._begin_what_can()
                self._end_what_did()
                self._tell_how_far()
        finally:
            for started in self._running.values():
                started.process.stop()
        return {job: self._states[job] for job in self._jobs}

    def _begin_what_can(self) -> None:
        for job_id in list(self._waiting):
            if len(self._running) == self._num_parallel:
                return
            job = self._jobs[job_id]
            if all(parent in self._states for parent in job.parents):
                self._waiting.remove(job_id)
                self._begin(job)

    def _begin(self, job: Job) -> None:
        """Skips, blocks or starts a job whose parents have ended."""
        parents = [self._states[parent] for parent in job.parents]
        failed = next((p for p, s in zip(job.parents, parents, strict=True) if s.status != "finished"), None)
        if failed is not None:
            self._say(job, f"blocked, {failed} did not finish")
            self._states[job.id] = JobState("blocked", "", error=f"{failed} did not finish")
            return
        wanted = fingerprint(job, parents)
        earlier = read_state(job)
        if earlier is not None and still_counts(job, earlier, wanted):
            self._say(job, "already done")
            self._states[job.id] = earlier
            return
        self._say(job, shlex.join(job.command))
        _clear(job)
        self._running[job.id] = _Started(JobProcess(job, threads=self._threads), wanted)

    def _end_what_did(self) -> None:
        """Waits a moment, then takes in the jobs that have ended."""
        if self._running:
            time.sleep(_POLL_SECONDS)
        for job_id, started in list(self._running.items()):
            ended = started.process.poll()
            if ended is not None:
                del self._running[job_id]
                self._end(self._jobs[job_id], ended, started.fingerprint)

    def _tell_how_far(self) -> None:
        if time.monotonic() - self._told < _TELL_SECONDS:
            return
        self._told = time.monotonic()
        for job_id in self._running:
            job = self._jobs[job_id]
            found = progress(job.folder / LOG_FILE)
            if found is not None:
                self._say(job, found)

    def _end(self, job: Job, ended: Ended, wanted: str) -> None:
        error = _problem(job, ended.code)
        status = "finished" if error is None else "failed"
        outputs, records = (output_hash(job), records_hash(job)) if error is None else (None, None)
        state = JobState(status, wanted, outputs, ended.seconds, ended.peak_memory_mb, error, records)
        write_state(job, state)
        self._states[job.id] = state
        self._say(job, f"{status}{f', {error}' if error else f', {ended.seconds:.0f} s'}")

    def _say(self, job: Job, text: str) -> None:
        self._say_line(f"[{self._numbers[job.id]}/{len(self._jobs)}] {job.id}: {text}")


def _longest_first(jobs: Mapping[str, Job]) -> list[str]:
    """Ids with those first that the longest row of jobs waits for, so that no such row is left for the end."""
    length = dict.fromkeys(jobs, 1)
    for job in reversed(list(jobs.values())):
        for parent in job.parents:
            length[parent] = max(length[parent], length[job.id] + 1)
    return sorted(jobs, key=lambda job_id: -length[job_id])


def _clear(job: Job) -> None:
    """Removes what an earlier run left, and writes the recipe."""
    for name in (job.output.name, f"{job.output.name}.partial", PREPARED_FOLDER):
        rmtree(job.folder / name, ignore_errors=True)
    (job.folder / STATE_FILE).unlink(missing_ok=True)
    job.write_recipe()


def _problem(job: Job, code: int) -> str | None:
    """Why the job did not do what its recipe says; `None` when it did."""
    if code != 0:
        return f"exit code {code}: {_last_line(job)} (all of it in {job.folder / LOG_FILE})"
    if output_hash(job) is None:
        return f"it left no result in {job.output}; look at {job.folder / LOG_FILE}"
    try:
        if job.kind == "lox":
            verify(job.output)
        if job.kind == "train" and is_defended(job.recipe):
            verify(job.output, defense=job.recipe["safety_defense"])
    except UserError as error:
        return str(error)
    if job.kind == "train" and "simulated_user" in job.recipe and not (job.output / "simulated_user.json").is_file():
        return "it did not train on the simulated user's data; is the plugin in `plugins:`?"
    return None


def _last_line(job: Job) -> str:
    lines = (job.folder / LOG_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    telling = [line for line in lines if "Error" in line and "CalledProcessError" not in line and "torchao" not in line]
    return printable((telling or lines or ["no output"])[-1].strip()[:500])
