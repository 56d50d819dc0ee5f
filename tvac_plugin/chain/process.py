"""One job's command as a process group of its own: started, watched, stopped, and found again after a crash."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from tvac_plugin.boundary.files import write_json
from tvac_plugin.chain.jobs import Job

RUNNING_FILE = "running.json"
LOG_FILE = "log.txt"


class Ended(NamedTuple):
    """How a command ended.

    Attributes:
        code: Exit code; negative for a signal.
        seconds: Wall-clock time.
        peak_memory_mb: Largest resident set of its processes.
    """

    code: int
    seconds: float
    peak_memory_mb: float


class JobProcess:
    """The running command of a job; its output goes to the job's log."""

    def __init__(self, job: Job, *, threads: int) -> None:
        """Starts it.

        Args:
            job: Whose command; its folder exists.
            threads: `OMP_NUM_THREADS` for it, unless the variable is set.
        """
        bin_folder = str(Path(sys.executable).parent)
        environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
        environment["PATH"] = os.pathsep.join([bin_folder, os.environ.get("PATH", "")])
        self._note = job.folder / RUNNING_FILE
        self._started = time.monotonic()
        with (job.folder / LOG_FILE).open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(  # noqa: S603 (a list, no shell; values stand behind their `--key=`)
                job.command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
                start_new_session=True,
            )  # fmt: skip
        try:
            write_json(self._note, {"group": self._process.pid})
        except BaseException:
            self.stop()
            raise

    def poll(self) -> Ended | None:
        """How the command ended; `None` while it runs."""
        pid, status, usage = os.wait4(self._process.pid, os.WNOHANG)
        if pid == 0:
            return None
        self._process.returncode = os.waitstatus_to_exitcode(status)
        self._note.unlink(missing_ok=True)
        seconds = round(time.monotonic() - self._started, 1)
        return Ended(self._process.returncode, seconds, peak_memory_mb(usage.ru_maxrss))

    def stop(self) -> None:
        """Kills the command and everything it started."""
        if self._process.returncode is None:
            with suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._note.unlink(missing_ok=True)


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Takes SIGTERM, as of `docker stop` or a scheduler, for Ctrl-C, so that what was started is stopped too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def peak_memory_mb(max_rss: int, *, platform: str = sys.platform) -> float:
    """The kernel's largest resident set in MB of 2**20 bytes; it counts bytes on macOS and KiB elsewhere."""
    return round(max_rss / (2**20 if platform == "darwin" else 2**10), 1)


def stop_orphans(root: Path) -> None:
    """Stops the processes that a killed chain left behind in its folder."""
    for note in root.glob(f"jobs/*/{RUNNING_FILE}"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            _stop_group(int(json.loads(note.read_text(encoding="utf-8"))["group"]), note.parent)
        note.unlink(missing_ok=True)


def _stop_group(group: int, folder: Path) -> None:
    """Kills a process group if one of its processes still works on `folder`; its number may be another's by now."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            is_ours = os.getpgid(int(process.name)) == group
            if is_ours and str(folder).encode() in (process / "cmdline").read_bytes():
                os.killpg(group, signal.SIGKILL)
                return
