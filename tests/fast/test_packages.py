"""Which Debian packages are installed, by dpkg's status file; and how work that was interrupted is finished."""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import pytest

from sparkinstall.cli.live_output import _Lines, _Screen
from sparkinstall.cli.text_output import console
from sparkinstall.errors import Problem
from sparkinstall.events import StepEnded, StepStarted, Warned
from sparkinstall.resources import Drift, NodeOnly, Ok, packages, state_of
from sparkinstall.resources.packages import STATUS as STATUS_FILE
from sparkinstall.resources.packages import Packages, installed
from sparkinstall.system import Result, RunOptions, Undo
from sparkinstall.system.local import LocalReader
from tests.support.machine import Machine
from tests.support.recording import RecordingSystem

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


# --- interrupted work

WANTED = ("git", "make")
WHOLE = "install ok installed"
HALVES = (
    "install ok unpacked",
    "install ok half-configured",
    "install ok half-installed",
    "install reinstreq half-installed",
    "install reinstreq installed",
    "install ok triggers-awaited",
    "install ok triggers-pending",
    "purge ok half-configured",
)


def status(**states: str) -> bytes:
    return "".join(f"Package: {name}\nStatus: {state}\nVersion: 1\n\n" for name, state in states.items()).encode()


class Dpkg(RecordingSystem):
    """A node whose programs change the states of its packages: `becomes` has the states after a command with a word."""

    def __init__(self, states: Mapping[str, str], becomes: Mapping[str, Mapping[str, str]], **updates: bytes) -> None:
        super().__init__({f"/var/lib/dpkg/updates/{name.strip('_')}": data for name, data in updates.items()})
        self.states, self.becomes = dict(states), becomes
        self.promised: list[Undo] = []
        self.failing_with = ""
        self.files[STATUS_FILE] = status(**self.states)

    def promise(self, undo: Undo) -> None:
        self.promised.append(undo)

    def try_run(self, *argv: str, **how: Unpack[RunOptions]) -> Result:
        result = super().try_run(*argv, **how)
        if self.failing_with:
            return Result(argv, 1, self.failing_with, "")
        if "dpkg" in argv:
            self.files = {name: data for name, data in self.files.items() if "/updates/" not in name}
        self.states |= next((states for word, states in self.becomes.items() if word in argv), {})
        self.files[STATUS_FILE] = status(**self.states)
        return result

    @property
    def ran(self) -> list[str]:
        """What was run, without the options that all have."""
        return [re.sub(".*--force-(confold|remove-reinstreq) ", "", line) for line in self.changed]


@pytest.mark.parametrize("half", HALVES)
def test_packages_with_a_half_installed_one_are_finished(half: str) -> None:
    on = Dpkg({"git": half, "make": WHOLE}, {"--configure": {"git": WHOLE}})
    state = Packages(WANTED).check(on)
    assert isinstance(state, Drift) and state.summary == "finish what dpkg was interrupted in (git)"
    Packages(WANTED).apply(on)
    assert isinstance(Packages(WANTED).check(on), Ok)
    assert on.ran == ["--configure -a"], "what dpkg can do alone needs no network"


def test_packages_of_a_bundle_are_installed_from_its_folder_alone(tmp_path: Path) -> None:
    on = _with_a_folder(tmp_path)
    assert len(on.changed) == 2
    for line in on.changed:
        assert f"-o Dir::Etc::sourcelist={tmp_path}/sources.list -o Dir::Etc::sourceparts=/dev/null" in line
        assert "-o Dir::State::lists=/var/lib/apt/sparkinstall" in line
    assert (tmp_path / "sources.list").read_text() == f"deb [trusted=yes] file:{tmp_path} ./\n"


class _TooNew(Dpkg):
    """What is installed does not go together with the packages in a folder."""

    def ask(
        self, *argv: str, timeout: float = 30, env: Mapping[str, str] | None = None, root: bool = False, stdin: str = ""
    ) -> Result:
        if "Dir::Etc::sourceparts=/dev/null" in argv:
            return Result(argv, 100, "", "")
        return super().ask(*argv, timeout=timeout, env=env, root=root, stdin=stdin)


def _with_a_folder(folder: Path, names: str = "make", system: str = "debian 13", *, too_new: bool = False) -> Dpkg:
    """A Debian 13 on which `make` was missing, with a folder of these packages; `too_new`: for the ones in it."""
    (folder / "Packages").write_text("".join(f"Package: {name}\nVersion: 1\n\n" for name in names.split()))
    (folder / "system").write_text(system)
    on = (_TooNew if too_new else Dpkg)({"git": WHOLE}, {"install": {"make": WHOLE}})
    on.files["/etc/os-release"] = b'ID=debian\nVERSION_ID="13"\n'
    Packages(WANTED, str(folder)).apply(on)
    return on


@pytest.mark.parametrize(
    "folder", [{"names": "git"}, {"system": "ubuntu 24.04"}, {"too_new": True}], ids=["lacks", "other", "too new"]
)
def test_packages_that_a_folder_cannot_provide_are_left_to_the_nodes_sources(
    tmp_path: Path, folder: Mapping[str, Any]
) -> None:
    on = _with_a_folder(tmp_path, **folder)
    assert "install make" in on.changed[-1] and "Dir::" not in on.changed[-1]


@pytest.mark.parametrize("states", [{"git": WHOLE, "make": WHOLE}, {"git": WHOLE}, {}], ids=["whole", "some", "none"])
def test_packages_with_updates_of_dpkg_are_not_whole(states: Mapping[str, str]) -> None:
    on = Dpkg(states, {"--configure": {"git": WHOLE, "make": WHOLE}}, _0003=b"", tmp_i=b"")
    state = Packages(WANTED).check(on)
    assert isinstance(state, Drift) and state.summary.startswith("finish what dpkg was interrupted in")
    Packages(WANTED).apply(on)
    assert isinstance(Packages(WANTED).check(on), Ok) and on.ran == ["--configure -a"]


def test_packages_with_a_temporary_file_in_updates_only_are_whole() -> None:
    """dpkg and apt count names of digits only."""
    assert isinstance(Packages(WANTED).check(Dpkg(dict.fromkeys(WANTED, WHOLE), {}, tmp_i=b"")), Ok)


def test_packages_with_a_pending_trigger_of_another_are_finished() -> None:
    on = Dpkg({**dict.fromkeys(WANTED, WHOLE), "man-db": "install ok triggers-pending"}, {"-a": {"man-db": WHOLE}})
    assert isinstance(Packages(WANTED).check(on), Drift)
    Packages(WANTED).apply(on)
    assert isinstance(Packages(WANTED).check(on), Ok)


@pytest.mark.parametrize("half", [each for each in HALVES if "triggers-pending" not in each])
def test_packages_of_others_that_dpkg_could_not_configure_are_theirs(half: str) -> None:
    assert isinstance(Packages(WANTED).check(Dpkg({**dict.fromkeys(WANTED, WHOLE), "theirs": half}, {})), Ok)


@pytest.mark.parametrize("program", ["dpkg", "apt-get", "apt"])
def test_packages_while_apt_works_were_not_interrupted(program: str) -> None:
    on = Dpkg(dict.fromkeys(WANTED, WHOLE), {}, _0003=b"")
    on.files["/proc/7/comm"] = f"{program}\n".encode()
    assert isinstance(Packages(WANTED).check(on), Ok)
    on.files[STATUS_FILE] = status(git="install ok unpacked")
    state = Packages(WANTED).check(on)
    assert isinstance(state, Drift) and state.summary == "wait for apt, which is at work (git), install make"


def test_packages_that_dpkg_cannot_finish_are_finished_by_apt_under_the_same_journal() -> None:
    on = Dpkg({"git": "install ok unpacked"}, {"-f": {"git": WHOLE, "perl": WHOLE}, "make": {"make": WHOLE}}, _0001=b"")
    on.answers = {"env DEBIAN": "Inst perl (1)\nInst git [1] (1)\n"}
    assert Packages(WANTED).check(on) == Drift(
        "finish what dpkg was interrupted in (git), install make", before="", after="git\nmake\n"
    )
    Packages(WANTED).apply(on)
    assert isinstance(Packages(WANTED).check(on), Ok)
    assert on.ran == ["--configure -a", "update", "--no-remove -f install", "--no-remove install make"]
    assert on.promised[0].after == {"packages": ["perl"]}, "git was there before this run"


def test_packages_that_were_there_before_are_never_ours() -> None:
    """Another user's apt was interrupted: what it had begun is not ours to purge."""
    on = Dpkg({"git": "install reinstreq half-installed"}, {"-f": {"git": WHOLE, "make": WHOLE}})
    on.answers = {"env DEBIAN": "Inst git (1)\nInst make (1)\n"}
    Packages(WANTED).apply(on)
    assert [each.after for each in on.promised] == [{"packages": ["make"]}]


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        ("dpkg: error: failed to write status database record: No space left on device", "the disk is full"),
        ("dpkg: error: dpkg frontend lock was locked by another process with pid 7", "another program holds a lock"),
    ],
)
def test_packages_that_cannot_be_finished_say_why(monkeypatch: pytest.MonkeyPatch, said: str, cause: str) -> None:
    monkeypatch.setattr(packages, "_PATIENCE", 0)
    on = Dpkg({}, {}, _0001=b"")
    on.failing_with = said
    with pytest.raises(Problem, match="`dpkg` could not finish what it was interrupted in") as found:
        Packages(WANTED).apply(on)
    assert found.value.cause.startswith(cause)


@pytest.mark.parametrize("offline", [True, False])
def test_packages_that_apt_does_not_know_say_whether_its_lists_are_new(offline: bool) -> None:
    on = Dpkg({}, {})
    on.failing = ("env DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 apt-get -y -o DPkg::Lock::Timeout=600 "
                  "-o APT::Install-Recommends=false -o Dpkg::Options::=--force-confold -s",)  # fmt: skip
    unresolved = "W: Failed to fetch http://d/InRelease  Temporary failure resolving 'd'\n" if offline else "Hit:1 d\n"
    on.answers = {f"{on.failing[0]} ": "E: Unable to locate package git", "env": unresolved}
    with pytest.raises(Problem, match="`apt-get` cannot install the missing packages") as found:
        Packages(WANTED).apply(on)
    assert ("could not reach a server" in found.value.cause, "name server" in found.value.hint) == (offline, offline)
    assert "Unable to locate package git" in found.value.cause


# --- sources of others that fail

UPDATE = "env DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 apt-get -y -o DPkg::Lock::Timeout=600 " \
         "-o APT::Install-Recommends=false -o Dpkg::Options::=--force-confold "  # fmt: skip
THEIRS = "https://repo.example.com/x"
# What apt-get 2.6 and 2.8 say of a source, and the exit code of `update`.
COMPLAINTS = (
    (f"E: The repository '{THEIRS} noble Release' does not have a Release file.", 100),
    (f"E: The repository '{THEIRS} noble InRelease' is not signed.", 100),
    (f"E: Failed to fetch {THEIRS}/dists/noble/InRelease  403  Forbidden [IP: 192.0.2.1 443]", 100),
    (f"E: Release file for {THEIRS}/dists/noble/InRelease is expired (invalid since 3d 2h).", 100),
    (f"E: Repository '{THEIRS} noble InRelease' changed its 'Suite' value from 'a' to 'b'", 100),
    (f"W: Failed to fetch {THEIRS}/dists/noble/InRelease  Temporary failure resolving 'repo.example.com'", 0),
    (f"W: Failed to fetch {THEIRS}/dists/noble/InRelease  Could not connect to 192.0.2.1:443, timed out", 0),
    (f"W: GPG error: {THEIRS} noble InRelease: The following signatures couldn't be verified because the public key is "
     "not available: NO_PUBKEY 0123456789ABCDEF", 100),
    ("E: Malformed entry 1 in list file /etc/apt/sources.list.d/theirs.list (Suite)", 100),
)  # fmt: skip
HARMLESS = (
    "W: https://d/InRelease: Key is stored in legacy trusted.gpg keyring (/etc/apt/trusted.gpg), see the DEPRECATION "
    "section in apt-key(8) for details.",
    "W: Target Packages (main/binary-arm64/Packages) is configured multiple times in /etc/apt/sources.list:1 and 2",
    "N: Skipping acquire of configured file 'main/binary-i386/Packages' as repository 'https://d noble' doesn't",
)


class Apt(Dpkg):
    """A node whose `apt-get update` says `said` and ends with `code`; `-s install` says `simulated`."""

    def __init__(self, said: str, code: int, simulated: str = "Inst git (1)\nInst make (1)\n") -> None:
        super().__init__({}, {"install": {"git": WHOLE, "make": WHOLE}})
        self.said, self.code, self.simulated = f"Hit:1 http://d noble InRelease\n{said}\n", code, simulated
        self.files["/etc/apt/sources.list.d/theirs.list"] = f"deb {THEIRS}/ noble main\n".encode()
        self.files["/etc/apt/sources.list.d/distribution.sources"] = b"URIs: http://d/\n"

    def try_run(self, *argv: str, **how: Unpack[RunOptions]) -> Result:
        result = super().try_run(*argv, **how)
        return Result(argv, self.code, self.said, "") if argv[-1] == "update" else result

    def _result(self, argv: Sequence[str]) -> Result:
        code = 100 if "-s" in argv and "E: " in self.simulated else 0
        return Result(tuple(argv), code, self.simulated if "-s" in argv else "", "")


@pytest.mark.parametrize(("said", "code"), COMPLAINTS)
def test_packages_are_installed_in_spite_of_a_source_that_fails(said: str, code: int) -> None:
    on = Apt(said, code)
    Packages(WANTED).apply(on)
    assert isinstance(Packages(WANTED).check(on), Ok)
    (warning,) = on.warned
    assert said in warning and "`apt-get update` failed" in warning
    assert "in /etc/apt/sources.list.d/theirs.list" in warning, "where it is named"


@pytest.mark.parametrize(("said", "code"), COMPLAINTS)
def test_packages_that_cannot_be_installed_name_the_source_that_fails(said: str, code: int) -> None:
    on = Apt(said, code, "E: Unable to locate package git")
    with pytest.raises(Problem, match="`apt-get` cannot install the missing packages") as found:
        Packages(WANTED).apply(on)
    problem = found.value
    assert "Unable to locate package git" in problem.cause and said in problem.cause and "env" not in problem.message
    network = "Temporary failure" in said or "Could not connect" in said
    assert ("name server" if network else "theirs.list") in problem.hint
    assert not on.warned


@pytest.mark.parametrize("said", ["", *HARMLESS])
def test_packages_with_sources_that_work_are_installed_without_a_warning(said: str) -> None:
    on = Apt(said, 0)
    Packages(WANTED).apply(on)
    assert not on.warned and isinstance(Packages(WANTED).check(on), Ok)


@pytest.mark.parametrize(
    ("said", "code", "cause"),
    [
        ("E: Write error - write (28: No space left on device)", 100, "the disk is full"),
        ("E: List directory /var/lib/apt/lists/partial is missing. (30: Read-only file system)", 100, "read-only"),
        ("", 137, "it was killed by SIGKILL"),
    ],
)
def test_packages_are_not_tried_after_a_failure_that_is_not_of_a_source(said: str, code: int, cause: str) -> None:
    on = Apt(said, code)
    with pytest.raises(Problem) as found:
        Packages(WANTED).apply(on)
    assert cause in found.value.cause and on.ran == ["update"]


@pytest.mark.parametrize("state", [*HALVES, "deinstall ok config-files", WHOLE])
def test_undo_packages_purges_what_an_interrupted_run_left(state: str) -> None:
    configured = WHOLE if "triggers-pending" in state else state
    becomes = {"--configure": {"git": configured}, "purge": {"git": "purge ok not-installed"}}
    on = Dpkg({"git": state, "theirs": WHOLE}, becomes, _0001=b"")
    on.answers = {"env DEBIAN": "Purg git\n"}
    undone = packages.purge([Undo("packages", "apt", {}, {"packages": ["git", "never-begun"]})], on)
    assert (undone.outcome, undone.note) == ("removed", "git")
    assert on.ran == ["--configure -a", "purge git"]


def test_undo_packages_that_are_only_removed_are_purged_the_next_time() -> None:
    on = Dpkg({"git": "purge ok half-installed"}, {"purge": {"git": "deinstall ok config-files"}})
    on.answers = {"env DEBIAN": "Purg git\n"}
    with pytest.raises(Problem, match="apt could not remove git"):
        packages.purge([Undo("packages", "apt", {}, {"packages": ["git"]})], on)
    assert on.ran == ["--configure -a", "purge git", "purge git"], "it is looked at after each"


@pytest.mark.parametrize("terminal", [True, False])
def test_warning_of_a_step_stays_on_the_screen(terminal: bool, capsys: pytest.CaptureFixture[str]) -> None:
    warned = Warned("packages", "`apt-get update` failed for [a] source")
    if terminal:
        screen = _Screen()
        for event in (StepStarted("packages"), warned, StepEnded("packages", "changed", 1.0)):
            screen.take(event)
        screen.leave(console(stderr=True))
    else:
        _Lines(verbose=False).take(warned)
    assert "packages: " in (said := capsys.readouterr().err) and "`apt-get update` failed for [a] source" in said
