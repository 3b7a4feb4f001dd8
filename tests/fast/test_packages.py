"""Which Debian packages are installed, by dpkg's status file."""

import shutil
from pathlib import Path

import pytest

from sparkinstall.resources import Drift, NodeOnly, Ok, state_of
from sparkinstall.resources.packages import Packages, installed
from sparkinstall.system.local import LocalReader
from tests.support.machine import Machine

STATUS = """\
Package: git
Status: install ok installed
Version: 1:2.43.0

Package: gone
Status: deinstall ok config-files
Version: 1

Package: half
Status: install ok half-configured
Version: 1

Package: mawk
Status: install ok installed
Provides: awk, another-awk (= 1.3)
Description: says
 Package: not-a-package
 Status: install ok installed
"""


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    status = tmp_path / "var/lib/dpkg/status"
    status.parent.mkdir(parents=True)
    status.write_text(STATUS)
    return Machine(str(tmp_path))


def test_installed_packages_are_those_fully_installed(machine: Machine) -> None:
    assert installed(machine) == {"git", "mawk", "awk", "another-awk"}


def test_packages_with_one_missing_names_it_only(machine: Machine) -> None:
    assert isinstance(Packages(("git", "awk")).check(machine), Ok)
    state = Packages(("git", "python3.12-dev")).check(machine)
    assert isinstance(state, Drift)
    assert state.summary == "install python3.12-dev"


def test_packages_in_a_rehearsal_are_node_only(tmp_path: Path) -> None:
    assert isinstance(state_of(Packages(("git",)), LocalReader(str(tmp_path))), NodeOnly)


@pytest.mark.skipif(shutil.which("dpkg-query") is None, reason="this machine has no dpkg to compare with")
def test_installed_packages_agree_with_dpkg() -> None:
    here = LocalReader()
    listed = here.ask("dpkg-query", "-W", "-f", "${Package} ${db:Status-Abbrev}\n").out.splitlines()
    whole = {line.split()[0] for line in listed if line.split()[1:] == ["ii"]}
    assert whole <= installed(here)
