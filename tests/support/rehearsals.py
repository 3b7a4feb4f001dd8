"""Rehearsals as a user runs them: one process per command, and trees of files to compare."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from sparkinstall.cli.app import program
from sparkinstall.events import silent
from sparkinstall.journal.state_dir import StateFolder
from sparkinstall.system.local import LocalSystem
from tests.support import forks
from tests.support.forks import CHECKOUT as CHECKOUT

SETTINGS = ("--set", "nccl.mode=wheel")
TIMEOUT_SECONDS = 300
ENVELOPE = {"version", "command", "status", "exit_code", "data", "errors"}

# Files about the runs, not about the node.
HISTORY = ("journal.jsonl", "journal.last", "logs", "lock")

Tree = dict[str, tuple[Any, ...]]


def command(*args: str | Path, through: str = "sparkinstall") -> list[str]:
    """The command line of one run; `through` is the module that runs in place of sparkinstall."""
    return [sys.executable, "-m", through, *map(str, args)]


def environment(**more: str) -> dict[str, str]:
    """This process's environment with the checkout first, and without the user's settings of sparkinstall."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SPARKINSTALL_")}
    return {**kept, "PYTHONPATH": str(CHECKOUT), **more}


def sparkinstall(*args: str | Path, through: str = "sparkinstall", **env: str) -> subprocess.CompletedProcess[str]:
    """Run a verb to its end in a process of its own, without a terminal."""
    if not any(name.startswith(forks.FOR_PYTHON) for name in env):
        return forks.run(through, [str(arg) for arg in args], environment(**env), TIMEOUT_SECONDS)
    return subprocess.run(
        command(*args, through=through),
        cwd=CHECKOUT,
        env=environment(**env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=TIMEOUT_SECONDS,
    )


def in_this_process(*args: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a verb in this process: starting Python would take most of the time of a small case."""
    kept = signal.getsignal(signal.SIGTERM)
    try:
        result = CliRunner().invoke(program(), [str(arg) for arg in args], prog_name="sparkinstall")
    finally:
        signal.signal(signal.SIGTERM, kept)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return subprocess.CompletedProcess(list(args), result.exit_code, result.stdout, result.stderr)


def envelope(run: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The JSON object on stdout; fails if stdout has anything else."""
    found = json.loads(run.stdout)
    assert run.stdout.count("\n") == 1, run.stdout
    assert set(found) == ENVELOPE, sorted(found)
    assert found["exit_code"] == run.returncode
    return dict(found)


def output_of(run: subprocess.CompletedProcess[str]) -> str:
    return run.stdout + run.stderr


@dataclass(frozen=True)
class Rehearsal:
    """A root folder, which may not exist yet, in a folder of the test's own, so that changes beside it are found."""

    root: Path
    options: tuple[str, ...] = SETTINGS

    def all(self, *args: str, through: str = "sparkinstall", **env: str) -> subprocess.CompletedProcess[str]:
        return sparkinstall("all", "--root", self.root, *self.options, *args, through=through, **env)

    def uninstall(self, *args: str, through: str = "sparkinstall", **env: str) -> subprocess.CompletedProcess[str]:
        return sparkinstall("uninstall", "--root", self.root, *args, through=through, **env)

    def start(self, *args: str, through: str = "sparkinstall", **env: str) -> subprocess.Popen[str]:
        """Start `all` (or the verb in `args`) in its own process group, as a shell does."""
        verb = args or ("all", *self.options)
        return subprocess.Popen(
            command(verb[0], "--root", self.root, *verb[1:], through=through),
            cwd=CHECKOUT,
            env=environment(**env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
        )

    @property
    def home(self) -> Path:
        """The state folder."""
        return self.root / "var/lib/sparkinstall"

    @property
    def journal(self) -> Path:
        return self.home / "journal.jsonl"

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.journal.read_text().splitlines()]

    def installed(self) -> Tree:
        """The tree without the history of the runs."""
        hidden = [str((self.home / name).relative_to(self.root.parent)) for name in HISTORY]
        whole = tree(self.root.parent)
        return {path: what for path, what in whole.items() if not path.startswith(tuple(hidden))}


def empty_rehearsal(root: Path) -> Path:
    """A rehearsal with only its journal and the folders around it."""
    root.mkdir()
    with StateFolder(LocalSystem(str(root))).hold("all", silent):
        pass
    return root


def tree(top: Path, times: Callable[[str], bool] | None = None) -> Tree:
    """Kind, mode, owner, target or content of all below `top`, and the time of the kinds that `times` accepts."""
    return dict(sorted(_described(top, "", times or no_times)))


def no_times(kind: str) -> bool:
    """For `tree`: compare two runs, which never have the same times."""
    return not kind


def files_with_times(kind: str) -> bool:
    """For `tree`: without folders, whose time changes with their entries and cannot be restored."""
    return kind == "file"


def everything_with_times(kind: str) -> bool:
    """For `tree`: show every change."""
    return bool(kind)


def _described(folder: Path, under: str, times: Callable[[str], bool]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for entry in os.scandir(folder):
        info, name = entry.stat(follow_symlinks=False), under + entry.name
        kind = {stat.S_IFDIR: "dir", stat.S_IFLNK: "link", stat.S_IFREG: "file"}[stat.S_IFMT(info.st_mode)]
        what: tuple[Any, ...] = (kind, oct(stat.S_IMODE(info.st_mode)), info.st_uid, info.st_gid)
        if kind == "file":
            what += (_content(entry.path, info),)
        elif kind == "link":
            what += (os.readlink(entry.path),)
        yield name, (*what, info.st_mtime_ns) if times(kind) else what
        if kind == "dir":
            yield from _described(Path(entry.path), name + "/", times)


_hashes: dict[tuple[int, int, int, int], str] = {}


def _content(path: str, info: os.stat_result) -> str:
    # uv links files from its cache: every tree has the same inodes, 1 GB of them.
    key = (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns)
    if key not in _hashes:
        with open(path, "rb") as file:
            _hashes[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _hashes[key]


def difference(one: Mapping[str, object], other: Mapping[str, object]) -> str:
    """The differences, one per line, for the message of an assertion."""
    names = sorted(name for name in {*one, *other} if one.get(name) != other.get(name))
    return "\n".join(f"{name}: {one.get(name)} -> {other.get(name)}" for name in names[:20])


OLD = 1_234_567_890_123_456_789


def add_files_of_others(root: Path) -> None:
    """Write files of others where sparkinstall will work: a folder, files, a link, odd modes and times."""
    env = root / "opt/sparkinstall/env"
    env.mkdir(parents=True)
    (root / "opt").chmod(0o2775)
    (root / "opt/theirs.txt").write_bytes(b"theirs\n")
    (env / "single-node.env").write_bytes(b"\x00\xffanother user's file\r\n")
    (env / "single-node.env").chmod(0o640)
    os.chown(env / "single-node.env", os.geteuid(), os.getegid())
    (env / "multi-node-head.env").symlink_to("../elsewhere.env")
    (root / "opt/sparkinstall/elsewhere.env").write_bytes(b"reached through a link\n")
    (root / "opt/sparkinstall/venv").mkdir(mode=0o700)
    # Different times: `_content` would take two files of one size and time for one that was moved.
    paths = (root / "opt/theirs.txt", env / "single-node.env", root / "opt/sparkinstall/elsewhere.env")
    for number, path in enumerate(paths):
        os.utime(path, ns=(OLD + number, OLD + number))


# Root without the capability to access other users' files is like an ordinary user.
ORDINARY_USER = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", *command())


def as_ordinary_user(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*ORDINARY_USER, *map(str, args)], cwd=CHECKOUT, env=environment(), capture_output=True, text=True, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
