"""What a job left behind, and whether it still counts: hashes of what went in and of what came out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.boundary.files import write_json
from tvac_plugin.boundary.imported import source_file
from tvac_plugin.boundary.paths import local_path
from tvac_plugin.boundary.secrets import without_secrets
from tvac_plugin.chain.jobs import Job
from tvac_plugin.defenses.custom import import_defense
from tvac_plugin.evaluation.judges import import_judge
from tvac_plugin.provenance.model_files import content_hash
from tvac_plugin.provenance.run_identity import versions
from tvac_plugin.provenance.trace import TRACE_FILE

STATE_FILE = "stage.json"
_RESULTS = (
    "*.safetensors", "*config.json", "tokenizer.json", "*.jinja", "safety_defense.json", "simulated_user.json",
    "evaluation.json",
)  # fmt: skip
_RECORDS = ("*.harmful_score.jsonl", TRACE_FILE, "trainer_state.json")
_HASHED_WHOLE = 256 * 2**20
_MOST_FILES = 100_000


class JobState(NamedTuple):
    """How a job ended.

    Attributes:
        status: "finished", "failed" or "blocked".
        fingerprint: Hash of everything that went in.
        outputs: Hash of what came out, for finished jobs.
        seconds: Wall-clock time.
        peak_memory_mb: Largest resident set of its processes.
        error: One sentence, for jobs that did not finish.
        records: Hash of what a report reads besides; apart, for no other job depends on it and it may hold timings.
    """

    status: str
    fingerprint: str
    outputs: str | None = None
    seconds: float | None = None
    peak_memory_mb: float | None = None
    error: str | None = None
    records: str | None = None


def fingerprint(job: Job, parents: list[JobState]) -> str:
    """Hash of all that a job depends on.

    That is its recipe without secrets, its parents' outputs, the local files it names and the installed versions.
    """
    inputs = {
        "recipe": without_secrets(job.recipe),
        "command": job.command,
        "parents": [parent.outputs for parent in parents],
        "files": {path: _file_hash(Path(path)) for path in sorted(set(_local_files(job)))},
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()


def output_hash(job: Job) -> str | None:
    """Hash of a job's weights, manifests and results; `None` when there are none."""
    return _hash(job, _RESULTS)


def still_counts(job: Job, earlier: JobState, wanted: str) -> bool:
    """Whether a job that ended so has the fingerprint `wanted` and all that it left.

    The states of earlier versions have no `records`, and count without.
    """
    is_same = earlier.status == "finished" and earlier.fingerprint == wanted
    return is_same and earlier.outputs == output_hash(job) and earlier.records in (None, records_hash(job))


def records_hash(job: Job) -> str | None:
    """Hash of the answers, trace and logged losses that a report shows; `None` when there are none."""
    return _hash(job, _RECORDS)


def _hash(job: Job, patterns: Sequence[str]) -> str | None:
    files = sorted({path for pattern in patterns for path in job.output.rglob(pattern)})
    if not files:
        return None
    parts = [f"{path.relative_to(job.output)} {_file_hash(path)}" for path in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def read_state(job: Job) -> JobState | None:
    """The state of an earlier run, if there is a readable one."""
    try:
        return JobState(**json.loads((job.folder / STATE_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_state(job: Job, state: JobState) -> None:
    """Records how a job ended."""
    write_json(job.folder / STATE_FILE, state._asdict())


def _local_files(job: Job) -> Iterator[str]:
    """Files named in the recipe that no job of this chain makes, and the sources of the user's own classes.

    A folder that holds the chain's own is left out, for it changes with every job, and so is one that holds a home.
    """
    root = job.folder.parent.parent
    yield from (str(source) for own in _own_classes(job.recipe) if (source := source_file(own)) is not None)
    for text in _strings(job.recipe):
        path = local_path(text)
        if (
            path is None
            or not path.exists()
            or root in path.resolve().parents
            or path.resolve() in (root, *root.parents, Path.home(), *Path.home().parents)
        ):
            continue
        yield from [str(path)] if path.is_file() else _files_below(path)


def _own_classes(recipe: Mapping[str, Any]) -> Iterator[type]:
    """The defense and the judges that a recipe names by their import path."""
    defense = str(recipe.get("safety_defense"))
    if "." in defense:
        yield import_defense(defense)
    for measure in ("harmful_score", "over_refusal"):
        asked = recipe.get(measure) or {}
        judges = (str(asked.get(key)) for key in ("judge", "second_judge"))
        yield from (import_judge(judge) for judge in judges if "." in judge)


def _files_below(folder: Path) -> list[str]:
    """The files of a folder.

    Raises:
        UserError: They are too many to tell whether any of them has changed.
    """
    files = list(islice((str(file) for file in folder.rglob("*") if file.is_file()), _MOST_FILES + 1))
    if len(files) > _MOST_FILES:
        raise UserError(f"{folder}: more than {_MOST_FILES:,} files. Name the folder in it that holds the data.")
    return files


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _file_hash(path: Path) -> str:
    """Hash of a file, read once in a process; a large one's change time stands for its content."""
    stat = path.stat()
    if stat.st_size > _HASHED_WHOLE:
        return f"{stat.st_size} bytes, changed {stat.st_mtime_ns} {stat.st_ctime_ns}"
    return _content_hash(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@lru_cache(maxsize=100_000)
def _content_hash(path: Path, *_version: int) -> str:
    return content_hash(path)
