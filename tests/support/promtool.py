"""promtool of Debian's Prometheus, unpacked and not installed: installed it would be a service that listens."""

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from tests.lab.cache import folder, kept, locked

_PACKAGE = "prometheus"


@cache
def promtool() -> str:
    """Return its path. Where it cannot be had the test is skipped, which in CI is a failure."""
    if found := shutil.which("promtool"):
        return found
    try:
        return str(kept("promtool", _offered(), _unpack) / "usr/bin/promtool")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no promtool (apt-get update; apt-get install {_PACKAGE}): {error}")


def checked(*words: str, cwd: Path, given: str = "") -> subprocess.CompletedProcess[str]:
    """Run promtool in a folder. `given`: what it reads from stdin."""
    return subprocess.run((promtool(), *words), cwd=cwd, input=given, capture_output=True, text=True, check=False)


def _offered() -> tuple[str, ...]:
    """What apt offers; on a machine that has never asked, after it has."""
    # apt-get does not wait for another one.
    with locked(folder() / "apt.lock"):
        if "(none)" in (candidate := _candidate()):
            subprocess.run(("apt-get", "update", "-qq"), check=True, capture_output=True)
            candidate = _candidate()
    return _PACKAGE, os.uname().machine, candidate


def _candidate() -> str:
    policy = subprocess.run(("apt-cache", "policy", _PACKAGE), check=True, capture_output=True, text=True).stdout
    return next((line.strip() for line in policy.splitlines() if "Candidate" in line), "(none)")


def _unpack(into: Path) -> None:
    subprocess.run(("apt-get", "download", _PACKAGE), cwd=into, check=True, capture_output=True)
    (package,) = into.glob("*.deb")
    subprocess.run(("dpkg-deb", "--extract", package, into), check=True, capture_output=True)
    package.unlink()
    for each in into.glob("usr/*"):
        if each.name != "bin":
            shutil.rmtree(each)
    (into / "usr/bin/prometheus").unlink()
