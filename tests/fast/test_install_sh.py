"""`install.sh` in the shells it may meet, with what it may not find."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "install.sh"


def _run(*argv: str, cwd: Path = REPOSITORY, **env: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["sh", str(SCRIPT), *argv], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, check=False
    )


def test_it_is_posix_and_clean() -> None:
    done = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.stdout == ""
    assert SCRIPT.read_text().splitlines()[-1] == 'main "$@"'


def test_a_cut_download_runs_nothing(tmp_path: Path) -> None:
    """All is in functions: whatever part of the script arrives, without its last line nothing happens."""
    lines = SCRIPT.read_text().splitlines(keepends=True)
    for end in range(10, len(lines), 7):
        part = tmp_path / "install.sh"
        part.write_text("".join(lines[:end]))
        subprocess.run(["sh", str(part)], env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, check=False)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["install.sh"]


def test_help_says_what_it_does() -> None:
    done = _run("--help")
    assert done.returncode == 0
    assert "--root ./node" in done.stdout
    assert "set -eu" not in done.stdout


def test_it_has_to_stand_in_the_checkout(tmp_path: Path) -> None:
    copy = tmp_path / "install.sh"
    shutil.copy(SCRIPT, copy)
    done = subprocess.run(["sh", str(copy)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "clone the repository" in done.stderr


def test_no_python_is_said_so(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "dirname", "sed", "id", "cat"):
        (tools / name).symlink_to(shutil.which(name) or "")
    done = _run("--root", "./node", PATH=str(tools), HOME=str(tmp_path))
    assert done.returncode == 4
    assert "Python 3.11 or newer" in done.stderr
    assert "sudo apt-get install python3" in done.stderr


def test_a_python_without_ensurepip_is_explained_in_a_rehearsal(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    python = Path(sys.executable).resolve()
    # Debian's python3 without python3-venv: it runs, and has no ensurepip.
    wrapper = tools / "python3"
    wrapper.write_text(f'#!/bin/sh\ncase "$2" in "import ensurepip") exit 1;; esac\nexec {python} "$@"\n')
    wrapper.chmod(0o755)
    for name in ("sh", "dirname", "sed", "id", "cat", "apt-get"):
        (tools / name).symlink_to(shutil.which(name) or "/bin/true")
    done = _run("--root", "./node", PATH=str(tools), HOME=str(tmp_path))
    assert done.returncode == 4
    assert "-venv is missing" in done.stderr
    assert not (tmp_path / ".local").exists()


@pytest.mark.network
def test_it_installs_the_command_once_and_takes_it_back(tmp_path: Path) -> None:
    def run(*argv: str) -> int:
        return _run(*argv, HOME=str(tmp_path), XDG_DATA_HOME="", XDG_BIN_HOME="").returncode

    assert run("--tool-only") == 0
    command = tmp_path / ".local/bin/sparkinstall"
    assert "sparkinstall" in subprocess.run([str(command), "--version"], capture_output=True, text=True).stdout
    made = (tmp_path / ".local/share/sparkinstall/tool/made-from").stat().st_mtime_ns
    assert run("--tool-only") == 0
    assert (tmp_path / ".local/share/sparkinstall/tool/made-from").stat().st_mtime_ns == made
    assert run("--remove") == 0
    assert not command.exists()
    assert not (tmp_path / ".local/share/sparkinstall").exists()
