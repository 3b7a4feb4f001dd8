"""Regenerate the locks of stacks from their YAML files: a maintainer's tool, run from the repository's root.

    PYTHONPATH=. python tools/lock.py                 # every shipped stack
    PYTHONPATH=. python tools/lock.py --tool          # sparkinstall's own, from pyproject.toml
    PYTHONPATH=. python tools/lock.py 0.22.1 tests/lab/stacks/lab-full.yaml
    PYTHONPATH=. python tools/lock.py --check         # write nothing, exit 1 if a lock differs

Runs the `uv` of this Python environment with the index that uv is configured for. Only metadata is downloaded, and no
address of that index is in a lock. Two runs give the same bytes: what a stack does not pin is resolved as of its day
`as_of`, for which the index must have upload times.

Only wheels that fit the stack's Python and the architecture (glibc 2.39: Ubuntu 24.04) are listed, so a lock has some
200 hashes instead of 4,500. Wheels that a stack names by address are copied from the YAML file: uv resolves the same
public version of the index in their place, with the pins under `needs` added.

sparkinstall's own locks, requirements.lock and requirements-dev.lock, are for every platform. What they have stays as
long as it fits pyproject.toml, so that a new requirement changes nothing else; without the file all is the newest.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path

from uv import find_uv_bin

from sparkinstall.stacks import Pin, Platform, Stack, StackError, load, names, render_lock

GLIBC = "manylinux_2_39"
REPOSITORY = Path(__file__).resolve().parents[1]
# What an installation from a checkout builds with, besides the build system that pyproject.toml names.
EDITABLE = "editables"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Regenerate the locks of stacks from their YAML files.")
    parser.add_argument("stacks", nargs="*", metavar="STACK", help="a shipped stack's name, or a YAML file")
    parser.add_argument("--tool", action="store_true", help="sparkinstall's own locks, instead of those of stacks")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a lock differs")
    arguments = parser.parse_args(argv)
    try:
        if arguments.tool:
            differing = written(stale_own(REPOSITORY), arguments.check)
        else:
            chosen = arguments.stacks or names()
            differing = [lock for name in chosen for lock in regenerate(load(name), arguments.check)]
    except StackError as error:
        print(error, file=sys.stderr)
        return 1
    return 1 if arguments.check and differing else 0


def regenerate(stack: Stack, check: bool) -> list[Path]:
    """Write the stack's locks (or only compare them). Returns the paths of those that differ.

    Raises StackError when uv finds no solution.
    """
    return written(stale(stack), check)


def written(differing: Mapping[Path, str], check: bool) -> list[Path]:
    """Write the new texts of locks (or only name them); return their paths."""
    for lock, text in differing.items():
        print(f"{lock.name}: {'differs' if check else 'written'}", file=sys.stderr)
        if not check:
            lock.write_text(text, encoding="utf-8")
    return list(differing)


def stale(stack: Stack) -> dict[Path, str]:
    """The stack's locks that differ, each with its new text. Raises StackError as above."""
    generated = {each.lock: lock_text(stack, each) for each in stack.platforms.values() if each.lock is not None}
    return {
        lock: text for lock, text in generated.items() if not lock.exists() or lock.read_text(encoding="utf-8") != text
    }


def stale_own(root: Path) -> dict[Path, str]:
    """The locks of the sparkinstall in `root` that differ, each with its new text. Raises StackError as above."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    builds = "".join(f"{each}\n" for each in (EDITABLE, *project["build-system"]["requires"]))
    python = project["project"]["requires-python"].removeprefix(">=")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        (wanted := Path(folder, "build.in")).write_text(builds, encoding="utf-8")
        for name, more in (("requirements.lock", (str(wanted),)), ("requirements-dev.lock", ("--group", "dev"))):
            lock, new = root / name, Path(folder, name)
            if lock.exists():
                shutil.copy(lock, new)
            argv = [find_uv_bin(), "pip", "compile", "--quiet", "--universal", "--generate-hashes", "--no-header"]
            argv += ["--no-annotate", "--python", sys.executable, "--python-version", python, "--output-file", str(new)]
            argv += ["pyproject.toml", *more]
            done = subprocess.run(argv, cwd=root, check=False, capture_output=True, text=True)
            if done.returncode:
                raise StackError(f"uv finds no solution for {name}:\n{done.stderr.strip()}")
            found[lock] = new.read_text(encoding="utf-8")
    return {lock: text for lock, text in found.items() if not lock.exists() or lock.read_text("utf-8") != text}


def lock_text(stack: Stack, platform: Platform) -> str:
    """Return the pins of a stack's lock on one platform. Raises StackError if uv finds no solution."""
    named = {wheel.name for wheel in platform.wheels}
    resolved = (pin for pin in resolve(stack, platform) if pin.name not in named)
    return render_lock((*resolved, *platform.wheels))


def resolve(stack: Stack, platform: Platform) -> list[Pin]:
    """Return every package that the pins require, with the sha256 of each compatible wheel."""
    pins = (*stack.requirements, *platform.needs)
    with tempfile.TemporaryDirectory() as folder:
        wanted, lock = Path(folder, "requirements.in"), Path(folder, "pylock.toml")
        wanted.write_text("".join(f"{pin.requirement}\n" for pin in pins), encoding="utf-8")
        argv = [*uv_argv(stack, platform), "--output-file", str(lock), str(wanted)]
        done = subprocess.run(argv, check=False, capture_output=True, text=True)
        if done.returncode:
            raise StackError(f"uv finds no solution for {stack.name} on {platform.arch}:\n{done.stderr.strip()}")
        return [pin_of(package) for package in tomllib.loads(lock.read_text(encoding="utf-8"))["packages"]]


def uv_argv(stack: Stack, platform: Platform) -> list[str]:
    # A pylock.toml has only compatible wheels; a requirements file would have the hashes of all.
    argv = [find_uv_bin(), "pip", "compile", "--quiet", "--format", "pylock.toml", "--no-header", "--no-annotate"]
    # Nothing is built, so any Python works: without this option uv would download the stack's.
    argv += ["--only-binary", ":all:", "--python", sys.executable, "--python-version", stack.python]
    argv += ["--python-platform", f"{platform.arch}-{GLIBC}"]
    if stack.as_of:
        argv += ["--exclude-newer", f"{stack.as_of}T00:00:00Z"]
        # A pin may be newer than the stack's date, such as Ray's in an old stack.
        for pin in stack.requirements:
            argv += ["--exclude-newer-package", f"{pin.name}=false"]
    return argv


def pin_of(package: dict[str, object]) -> Pin:
    wheels = package["wheels"]
    assert isinstance(wheels, list)  # --only-binary leaves nothing else
    hashes = sorted({f"sha256:{wheel['hashes']['sha256']}" for wheel in wheels})
    return Pin(str(package["name"]), str(package["version"]), hashes=tuple(hashes))


if __name__ == "__main__":
    raise SystemExit(main())
