"""Audits what is installed for this project: pinned, under a licence that was read, and free of known holes.

Pins and licences are checked from what is installed, without a network, and decide the exit status. Known holes need a
service: they are looked up when `pip-audit` is installed and reaches it, and a line says so when they were not.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CONSTRAINTS = Path(__file__).parent.parent / (
    "constraints.txt" if sys.version_info < (3, 12) else "constraints-3.12.txt"
)
EXTRAS = ("axolotl", "english", "dev")
ALLOWED = re.compile(
    r"\b(apache|mit|bsd|isc|psf|python software foundation|mpl|mozilla public|lgpl|lesser general public|unlicense|upl"
    r"|universal permissive|dual license)",
    re.IGNORECASE,
)
READ_BY_HAND = {
    "axolotl": "Apache-2.0, its integrations under the Axolotl Community License; see NOTICE",
    "hf-transfer": "Apache-2.0", "kernels-data": "Apache-2.0", "dotenv": "MIT", "openenv-core": "BSD-3-Clause",
    "sigstore-models": "MIT", "torchao": "BSD-3-Clause",
}  # fmt: skip
"""Licences of packages whose metadata name none."""
FROM_TORCH = ("nvidia-", "cuda-")
"""Brought and pinned by a CUDA build of torch, under NVIDIA's licence."""
INSTALLERS = {"pip", "setuptools", "wheel"}
"""Come with the virtual environment."""


class Finding(NamedTuple):
    """Something wrong with one package."""

    package: str
    problem: str


def installed() -> dict[str, Distribution]:
    """What this project needs, directly or not, and is installed, by canonical name."""
    found: dict[str, Distribution] = {}
    waiting = [("tvac-plugin", EXTRAS)]
    seen = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            found[canonicalize_name(name)] = package = distribution(name)
        except PackageNotFoundError:
            continue
        for text in package.requires or []:
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in (*extras, "")):
                waiting.append((needed.name, tuple(sorted(needed.extras))))
    found.pop("tvac-plugin", None)
    return found


def pin_findings(packages: dict[str, Distribution], pins: dict[str, str]) -> list[Finding]:
    """Packages that the constraints do not pin, or pins to another version than is installed."""
    findings = []
    for name, package in packages.items():
        version = package.version.partition("+")[0]
        if name in INSTALLERS or name.startswith(FROM_TORCH) or pins.get(name) == version:
            continue
        problem = f"is pinned to {pins[name]}" if name in pins else "is not in the constraints"
        findings.append(Finding(name, f"{version} is installed and {problem}. Pin what is tested."))
    return findings


def licence_findings(packages: dict[str, Distribution]) -> list[Finding]:
    """Packages whose licence is none of those allowed."""
    return [
        Finding(name, f"licence {licence(package) or 'not named'!r}. Read it, and add it to tools/audit.py or drop it.")
        for name, package in packages.items()
        if not (name in READ_BY_HAND or name.startswith(FROM_TORCH) or ALLOWED.search(licence(package)))
    ]


def licence(package: Distribution) -> str:
    """What a package's metadata say of its licence."""
    metadata = package.metadata
    classifiers = [text for text in metadata.get_all("Classifier", []) if text.startswith("License ::")]
    expression = metadata.get("License-Expression") or (metadata.get("License") or "").partition("\n")[0]
    return "; ".join(filter(None, [expression, *classifiers]))


def known_holes() -> tuple[list[Finding], str]:
    """Published holes in the pinned versions, and a line on how far they were looked for."""
    program = shutil.which("pip-audit")
    if program is None:
        return [], "NOT CHECKED for known holes: pip-audit is not installed (`pip install pip-audit`)."
    options = ["--requirement", str(CONSTRAINTS), "--no-deps", "--disable-pip", "--format=json", "--service=osv"]
    done = subprocess.run([program, *options, "--progress-spinner=off"], capture_output=True, text=True, check=False)  # noqa: S603
    try:
        entries = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return [], f"NOT CHECKED for known holes: {reason}"
    holes = [
        Finding(entry["name"], f"{entry['version']} has {hole['id']}; fixed in {hole['fix_versions'] or 'none yet'}.")
        for entry in entries
        for hole in entry.get("vulns", [])
    ]
    skipped = [entry["name"] for entry in entries if "skip_reason" in entry]
    missed = f", NOT CHECKED: {', '.join(skipped)}" if skipped else ""
    return holes, f"{len(entries) - len(skipped)} packages checked for known holes{missed}."


def read_pins(text: str) -> dict[str, str]:
    """Versions by canonical name."""
    pairs = [line.split("==") for line in text.splitlines() if "==" in line and not line.startswith("#")]
    return {canonicalize_name(name): version.partition(";")[0].strip() for name, version in pairs}


def main() -> int:
    """Prints findings; 1 if there are any."""
    packages = installed()
    holes, line = known_holes()
    findings = [
        *pin_findings(packages, read_pins(CONSTRAINTS.read_text(encoding="utf-8"))),
        *licence_findings(packages),
        *holes,
    ]
    sys.stdout.writelines(f"{finding.package}: {finding.problem}\n" for finding in findings)
    sys.stdout.write(f"{len(packages)} dependencies: pins and licences checked. {line}\n")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
