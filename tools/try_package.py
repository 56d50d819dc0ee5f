"""Tries a built wheel as a user would: in an environment of its own, outside of the repository, from install to verify.

`make dist` builds and tries. It takes minutes and needs a package index, so it is no test.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
COMMANDS = (
    ("tvac", "--help"),
    ("tvac", "recipes", "--output", "recipes"),
    ("tvac", "tiny-world", "--output", "outputs/tiny_world"),
    ("axolotl", "tvac", "check", "recipes/tvaccine_tiny.yml"),
    ("axolotl", "train", "recipes/tvaccine_tiny.yml", "--max-steps=20"),
    ("tvac", "verify", "outputs/tvaccine_tiny", "--defense", "t_vaccine"),
)
"""What somebody types who has the package and not the repository."""
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}


def try_wheel(wheel: Path, folder: Path) -> None:
    """Installs `wheel` into a new environment below `folder` and runs the commands there; fails with the first."""
    bin_folder = folder / "venv" / "bin"
    _run([sys.executable, "-m", "venv", str(bin_folder.parent)], folder)
    constraints = ["--quiet", "--constraint", str(ROOT / "constraints.txt")]
    for package in ("torch", f"tvac-plugin[axolotl] @ {wheel.as_uri()}"):
        _run([str(bin_folder / "pip"), "install", *constraints, package], folder)
    for name, *arguments in COMMANDS:
        _run([str(bin_folder / name), *arguments], folder, path=bin_folder)


def _run(command: list[str], folder: Path, *, path: Path | None = None) -> None:
    sys.stdout.write(f"$ {' '.join(command)}\n")
    sys.stdout.flush()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | ENVIRONMENT
    if path is not None:
        environment["PATH"] = os.pathsep.join([str(path), os.environ.get("PATH", "")])
    subprocess.run(command, cwd=folder, env=environment, check=True)  # noqa: S603 (a list, no shell)


def main() -> None:
    """Tries the newest wheel in `dist/`."""
    wheels = sorted((ROOT / "dist").glob("*.whl"), key=lambda path: path.stat().st_mtime)
    if not wheels:
        sys.exit("dist/: no wheel here. Run `make dist`, which builds one.")
    with TemporaryDirectory() as folder:
        try_wheel(wheels[-1].resolve(), Path(folder))
    sys.stdout.write(f"{wheels[-1].name}: works outside of the repository.\n")


if __name__ == "__main__":
    main()
