"""`install.sh`: its options, locks and signals, and machines on which something is missing."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparkinstall.cli.app import command
from tests.support.bundles import HERE, OTHER, Maker, packed, written
from tests.support.far_nodes import FarNodes
from tests.support.mounts import small_disk
from tests.support.rehearsals import envelope, everything_with_times, output_of, tree
from tests.support.tiny_stack import small_stack
from tests.support.waiting import until

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "install.sh"


def _run(*argv: str, cwd: Path = REPOSITORY, **env: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["sh", str(SCRIPT), *argv], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, check=False
    )


def test_script_passes_shellcheck() -> None:
    done = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.stdout == ""
    assert SCRIPT.read_text().splitlines()[-1] == 'main "$@"'


def test_script_cut_anywhere_runs_nothing(tmp_path: Path) -> None:
    """All code is in functions: without its last line the script does nothing."""
    lines = SCRIPT.read_text().splitlines(keepends=True)
    for end in range(10, len(lines), 7):
        part = tmp_path / "install.sh"
        part.write_text("".join(lines[:end]))
        subprocess.run(["sh", str(part)], env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, check=False)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["install.sh"]


def test_help_shows_the_comment_of_the_script() -> None:
    done = _run("--help")
    assert done.returncode == 0
    assert "--root ./node" in done.stdout
    assert "set -eu" not in done.stdout


def test_script_outside_a_checkout_is_refused(tmp_path: Path) -> None:
    copy = tmp_path / "install.sh"
    shutil.copy(SCRIPT, copy)
    done = subprocess.run(["sh", str(copy)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "clone the repository" in done.stderr


def test_python_missing_is_an_error_with_a_hint(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "dirname", "sed", "id", "cat"):
        (tools / name).symlink_to(shutil.which(name) or "")
    done = _run("--root", "./node", PATH=str(tools), HOME=str(tmp_path))
    assert done.returncode == 4
    assert "Python 3.11 or newer" in done.stderr
    assert "sudo apt-get install python3" in done.stderr


def test_python_without_ensurepip_in_a_rehearsal_is_an_error(tmp_path: Path) -> None:
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


# --- a machine with scripts in place of Python, apt and sudo: no network, no long waits

_PYTHON = """\
#!/bin/sh
case "$1 $2" in
    "-c import ensurepip") [ ! -e "$HOME/no-ensurepip" ]; exit ;;
    "-m venv") ;;
    *) exec {python} "$@" ;;
esac
mkdir -p "$3/bin"
cp "$HOME/fake-tool" "$3/bin/tool"
cp "$HOME/fake-tool" "$3/bin/sparkinstall"
cp "$HOME/fake-pip" "$3/bin/pip"
cp "$HOME/fake-venv-python" "$3/bin/python"
# Like a real one, it takes time, and prints a traceback on Ctrl-C.
exec {python} -c 'import os, time
print("begun", file=open(os.environ["HOME"] + "/made", "a"), flush=True)
while os.path.exists(os.environ["HOME"] + "/hold"): time.sleep(0.02)'
"""
# That of the new environment: it runs either the tool or pip.
_VENV_PYTHON = """\
#!/bin/sh
case "$*" in "-I -m sparkinstall"*) shift 3; exec "${0%/*}/tool" "$@" ;; *) exec "${0%/*}/pip" "$@" ;; esac
"""
_APT = """\
#!/bin/sh
case "$*" in
    *" update "*)
        echo update >>"$HOME/apt"
        [ "$(wc -l <"$HOME/apt")" -gt "$(cat "$HOME/held")" ] || { cat "$HOME/message" >&2; exit 100; } ;;
    *" -s "*) echo "Inst python3-venv (1 Debian [all])" ;;
    *" install "*) [ ! -e "$HOME/not-there" ] || exit 100; rm "$HOME/no-ensurepip" ;;
esac
"""
_HELD = """\
E: Could not get lock /var/lib/apt/lists/lock. It is held by process 812 (apt-get)
E: Unable to lock directory /var/lib/apt/lists/
"""


class Machine:
    """An empty home, and beside it the programs that come first on the PATH."""

    def __init__(self, folder: Path) -> None:
        self.home, self.bin = folder / "home", folder / "bin"
        self.home.mkdir()
        self.bin.mkdir()
        self.command = self.home / ".local/bin/sparkinstall"
        self.tool = self.home / ".local/share/sparkinstall/tool"
        self.env = {
            **os.environ, "HOME": str(self.home), "PATH": f"{self.bin}:{os.environ['PATH']}", "SHELL": "/bin/bash",
            "XDG_DATA_HOME": "", "XDG_BIN_HOME": "",
        }  # fmt: skip
        self._put(self.bin / "python3.13", _PYTHON.format(python=sys.executable))
        self._put(self.home / "fake-venv-python", _VENV_PYTHON)
        self._put(self.home / "fake-pip", "#!/bin/sh\n")
        self._put(self.home / "fake-tool", '#!/bin/sh\necho "$@"\n')
        self._put(self.bin / "apt-get", _APT)
        self._put(self.bin / "sudo", '#!/bin/sh\nexec "$@"\n')
        self._put(self.bin / "sleep", '#!/bin/sh\necho "$@" >>"$HOME/slept"\n')

    def _put(self, path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def replace_program(self, name: str, text: str) -> None:
        """Set what this program does in environments created from now on."""
        self._put(self.home / name, f"#!/bin/sh\n{text}\n")

    def lacks_ensurepip(self, held: int, message: str = _HELD) -> None:
        """Remove ensurepip; apt prints `message` this many times before it reads its lists."""
        for name, text in (("no-ensurepip", ""), ("held", f"{held}\n"), ("message", message)):
            (self.home / name).write_text(text)

    def lines(self, name: str) -> list[str]:
        path = self.home / name
        return path.read_text().splitlines() if path.exists() else []

    def start(self, *argv: str) -> "subprocess.Popen[str]":
        # A process group of its own, as on a terminal; a process in the background would ignore SIGINT.
        return subprocess.Popen(
            ["env", "--default-signal=INT,TERM,HUP", "sh", str(SCRIPT), *argv],
            env=self.env, cwd=self.home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip

    def run(self, *argv: str) -> "subprocess.CompletedProcess[str]":
        process = self.start(*argv)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(argv, process.returncode, out, err)

    def start_and_hold(self, *argv: str) -> "subprocess.Popen[str]":
        """A run that is creating the environment, until `let_go`."""
        (self.home / "hold").touch()
        begun = len(self.lines("made"))
        process = self.start(*argv)
        until(lambda: len(self.lines("made")) > begun, during=process)
        return process

    def let_go(self) -> None:
        (self.home / "hold").unlink()


def _ended(process: "subprocess.Popen[str]") -> tuple[int, str]:
    _, err = process.communicate(timeout=300)
    return process.returncode, err


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


# --- apt


def test_apt_lock_held_is_waited_for_and_its_holder_named(machine: Machine) -> None:
    machine.lacks_ensurepip(held=3)
    done = machine.run("--tool-only")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("held by apt-get (process 812); waiting") == 1
    assert machine.lines("slept") == ["5", "5", "5"]
    assert (machine.tool.parent / "apt-packages").read_text() == "python3-venv\n"


def test_apt_lock_held_for_five_minutes_is_an_error(machine: Machine) -> None:
    machine.lacks_ensurepip(held=1000)
    done = machine.run("--tool-only")
    assert done.returncode == 1
    assert "held for 5 minutes by apt-get (process 812)" in done.stderr
    assert "run this again" in done.stderr
    assert machine.lines("slept") == ["5"] * 60


def test_apt_lock_of_an_unnamed_holder_is_waited_for(machine: Machine) -> None:
    machine.lacks_ensurepip(held=1, message="E: Unable to lock directory /var/lib/apt/lists/\n")
    done = machine.run("--tool-only")
    assert done.returncode == 0
    assert "held by another program; waiting" in done.stderr


WITHOUT_A_RELEASE = "E: The repository 'https://repo.example.com/x noble Release' does not have a Release file.\n"


@pytest.mark.parametrize("message", [WITHOUT_A_RELEASE, "E: Failed to fetch https://d/InRelease  403  Forbidden\n"])
def test_apt_source_that_fails_is_named_and_the_package_installed(machine: Machine, message: str) -> None:
    machine.lacks_ensurepip(held=1000, message=message)
    done = machine.run("--tool-only")
    assert done.returncode == 0, done.stderr
    assert message in done.stderr and "continuing with those that it has" in done.stderr
    assert machine.lines("slept") == [], "only a lock is waited for"


def test_apt_source_that_fails_is_named_where_the_package_cannot_be_installed(machine: Machine) -> None:
    machine.lacks_ensurepip(held=1000, message=WITHOUT_A_RELEASE)
    (machine.home / "not-there").touch()
    done = machine.run("--tool-only")
    assert done.returncode == 1
    assert WITHOUT_A_RELEASE in done.stderr and "apt could not install python3" in done.stderr


# --- two runs at once, and Ctrl-C


def test_second_run_waits_and_installs_nothing(machine: Machine) -> None:
    first = machine.start_and_hold("--tool-only")
    second = machine.start("--tool-only")
    assert second.stderr is not None
    assert "Another install.sh is running" in second.stderr.readline()
    assert (machine.tool / "bin/python").exists()
    machine.let_go()
    assert _ended(first)[0] == 0
    code, output = _ended(second)
    assert (code, "Installing" in output) == (0, False)
    assert machine.lines("made") == ["begun"]


def test_second_run_interrupted_while_waiting_does_not_disturb_the_first(machine: Machine) -> None:
    assert machine.run("--tool-only").returncode == 0
    (machine.tool / "made-from").write_text("another checkout\n")
    first = machine.start_and_hold("--tool-only")
    second = machine.start("--tool-only")
    assert second.stderr is not None
    assert "Another install.sh is running" in second.stderr.readline()
    os.killpg(second.pid, signal.SIGINT)
    assert _ended(second)[0] == 130
    machine.let_go()
    assert _ended(first)[0] == 0
    assert (machine.tool / "made-from").read_text() != "another checkout\n"


def test_python_is_not_disturbed_by_variables_and_stdin_of_the_user(machine: Machine) -> None:
    """With PYTHONHOME or a folder as stdin Python itself does not start."""
    machine.env |= {"PYTHONHOME": "/nowhere", "PYTHONHASHSEED": "x"}
    machine.replace_program("fake-venv-python", f'exec {sys.executable} -c "import sys; print(sys.argv[1:])" "$@"')
    assert machine.run("--tool-only").returncode == 0
    machine.replace_program("../home/.local/share/sparkinstall/tool/bin/python", '[ ! -d /dev/stdin ] && echo "$@"')
    folder = os.open(machine.home, os.O_RDONLY)
    done = subprocess.run([machine.command, "a b", "c"], stdin=folder, env=machine.env, capture_output=True, text=True)
    os.close(folder)
    assert (done.returncode, done.stdout) == (0, "-I -m sparkinstall a b c\n"), done.stderr


def test_killed_run_leaves_no_lock(machine: Machine) -> None:
    killed = machine.start_and_hold("--tool-only")
    os.killpg(killed.pid, signal.SIGKILL)
    assert _ended(killed)[0] == -signal.SIGKILL
    machine.let_go()
    done = machine.run("--tool-only")
    assert done.returncode == 0
    assert "Another" not in done.stderr
    assert os.access(machine.command, os.X_OK)


def test_run_without_flock_succeeds(machine: Machine, tmp_path: Path) -> None:
    tools = tmp_path / "few"
    tools.mkdir()
    for name in (
        *("sh", "env", "dirname", "sed", "id", "cat", "find", "sha256sum", "sort", "cut", "rm", "mkdir", "mv", "cp"),
        *("ln", "readlink", "grep"),
    ):
        (tools / name).symlink_to(shutil.which(name) or "")
    machine.env["PATH"] = f"{machine.bin}:{tools}"
    assert machine.run("--tool-only").returncode == 0
    assert machine.run("--remove").returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_run_says_so_and_restores_the_former_tool(machine: Machine, number: signal.Signals) -> None:
    assert machine.run("--tool-only").returncode == 0
    (machine.tool / "made-from").write_text("another checkout\n")
    held = machine.start_and_hold("--tool-only")
    os.killpg(held.pid, number)
    code, output = _ended(held)
    assert code == 130
    assert "Traceback" not in output
    # The shell itself prints a word on signals other than SIGINT.
    first, *words, last = output.splitlines()
    assert first.startswith("Installing")
    assert words in ([], ["Terminated"], ["Hangup"])
    assert last == "✗ interrupted; run it again: it continues where this one stopped"
    assert (machine.tool / "made-from").read_text() == "another checkout\n"
    assert not machine.tool.with_name("tool.old").exists()
    machine.let_go()
    assert machine.run("--tool-only").returncode == 0
    assert (machine.tool / "made-from").read_text() != "another checkout\n"


def test_pip_failure_shows_its_output(machine: Machine) -> None:
    machine.replace_program("fake-pip", "echo 'no route to the index' >&2; exit 1")
    done = machine.run("--tool-only")
    assert done.returncode == 1
    assert "no route to the index" in done.stderr
    assert "packages could not be installed" in done.stderr


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ("WARNING: Retrying (Retry(total=4)) after connection broken by 'NewConnectionError'", "check the network"),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "free some space"),
        ("WARNING: Location '/a' is ignored\nERROR: No matching distribution found for x", "see the messages above"),
    ],
)
def test_pip_failure_has_the_hint_for_what_pip_said(machine: Machine, said: str, hint: str) -> None:
    machine.replace_program("fake-pip", f'cat >&2 <<"END"\n{said}\nEND\nexit 1')
    done = machine.run("--tool-only")
    assert done.returncode == 1
    assert hint in done.stderr
    assert not (machine.home / ".local/share/sparkinstall").exists()


# --- options


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("remove", "did you mean --remove?"),
        ("verify", "unexpected argument 'verify'"),
        ("--full ./node", "unexpected argument './node'"),
        ("--remvoe", "unknown option --remvoe"),
        ("--roots ./node", "unknown option --roots"),
        ("--roots=./node", "unknown option --roots"),
        ("-x", "unknown option -x"),
        ("-yx", "unknown option -yx"),
        ("--", "unknown option --"),
        ("--tool-only nonsense", "--tool-only cannot be combined with other options"),
        ("--yes --tool-only", "--tool-only cannot be combined with other options"),
        ("--remove --yes", "--remove cannot be combined with other options"),
        ("--root", "--root needs a value"),
        ("--root=", "--root needs a value"),
        ("--root --yes", "--root needs a value"),
        ("--yes=no", "--yes takes no value"),
        ("--bundle missing.tar", "there is no bundle missing.tar"),
        ("--bundle=missing.tar --root ./node", "there is no bundle missing.tar"),
        ("--tool-only --bundle missing.tar", "there is no bundle missing.tar"),
        ("--bundle", "--bundle needs a value"),
        ("--tool-only --root ./node", "--tool-only can be combined with --bundle FILE only"),
        ("--bundle missing.tar --tool-only --yes", "--tool-only cannot be combined with other options"),
    ],
)
def test_options_invalid_are_refused_before_any_change(machine: Machine, words: str, message: str) -> None:
    before = sorted(machine.home.iterdir())
    done = machine.run(*words.split(" "))
    assert done.returncode == 2
    assert message in done.stderr
    assert "  do    " in done.stderr
    assert sorted(machine.home.iterdir()) == before


def test_root_empty_is_refused(machine: Machine) -> None:
    assert "--root needs a value" in machine.run("--root", "").stderr


def test_options_equal_those_of_all() -> None:
    valued: set[str] = set()
    plain: set[str] = set()
    letters: set[str] = set()
    options: Any = command("all").params
    for option in (each for each in options if not each.hidden):
        for name in (*option.opts, *option.secondary_opts):
            if name in ("-h", "--help"):
                continue
            (letters if not name.startswith("--") else plain if option.is_flag else valued).add(name)
    lists = dict(re.findall(r"^(VALUED|PLAIN|LETTERS)='?([^'\n]*)'?$", SCRIPT.read_text(), re.MULTILINE))
    assert set(lists["VALUED"].split()) == valued
    assert set(lists["PLAIN"].split()) == plain
    assert {f"-{letter}" for letter in lists["LETTERS"]} == letters


def test_options_valid_are_passed_to_all(machine: Machine) -> None:
    words = ("--root", "./my node", "--set=prefix=/x", "--only", "nccl", "--full", "-yv", "--json")
    done = machine.run(*words)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"all {' '.join(words)}\n"


# --- a bundle


def _bundle(folder: Path, platform: str = HERE, **files: bytes) -> Path:
    """A bundle of this checkout's tool; `files` by the names of wheels."""
    lock = (REPOSITORY / "requirements.lock").read_bytes()
    wheels = {f"tool/{name}-1-py3-none-any.whl": content for name, content in files.items()}
    return written(folder, packed({"sparkinstall/requirements.lock": lock, **wheels}, platform=platform))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut", "it ends after"),
        ("hash", "tool/uv-1-py3-none-any.whl does not have a hash of requirements.lock"),
        ("other machine", "it is for"),
        ("no uv", "it has no uv"),
        ("other tool", "it was made by another sparkinstall than this one"),
    ],
)
@pytest.mark.parametrize("words", ["--bundle {} --root ./node", "--tool-only --bundle {}", "--bundle={} --root=./node"])
def test_bundle_that_cannot_be_used_is_one_error_and_changes_nothing(
    machine: Machine, tmp_path: Path, damage: str, message: str, words: str
) -> None:
    uv = "another" if damage == "no uv" else "uv"
    path = _bundle(tmp_path, OTHER if damage == "other machine" else HERE, **{uv: b"wheel"})
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "other tool":
        written(tmp_path, packed({"sparkinstall/requirements.lock": b"another"}))
    before = sorted(machine.home.rglob("*"))
    machine.env["TMPDIR"] = str(tmp_path / "temporary")
    (tmp_path / "temporary").mkdir()
    done = machine.run(*words.format(path).split(" "))
    assert done.returncode == 1
    assert done.stderr.count("✗") == 1 and f"✗ the bundle {path} cannot be used: {message}" in done.stderr
    assert "  do    " in done.stderr and "Traceback" not in done.stderr
    assert sorted(machine.home.rglob("*")) == before
    assert list((tmp_path / "temporary").iterdir()) == []


def test_bundle_that_is_damaged_is_refused_where_its_tool_is_installed(machine: Machine, tmp_path: Path) -> None:
    assert machine.run("--tool-only").returncode == 0
    path = _bundle(tmp_path, uv=b"wheel")
    path.write_bytes(path.read_bytes()[:-1])
    before = tree(machine.home, everything_with_times)
    done = machine.run("--tool-only", "--bundle", str(path))
    assert done.returncode == 1 and f"✗ the bundle {path} cannot be used: it ends after" in done.stderr
    assert tree(machine.home, everything_with_times) == before


def test_bundle_on_a_full_disk_for_temporary_files_is_one_error(machine: Machine, tmp_path: Path) -> None:
    path, before = _bundle(tmp_path, uv=b"u" * 100_000), sorted(machine.home.rglob("*"))
    with small_disk(tmp_path / "temporary", "8k") as disk:
        machine.env["TMPDIR"] = str(disk)
        done = machine.run("--bundle", str(path), "--tool-only")
        assert list(disk.iterdir()) == []
    assert done.returncode == 1 and f"✗ the bundle {path} cannot be unpacked to {disk}/" in done.stderr
    assert "No space left" in done.stderr and "set TMPDIR" in done.stderr and done.stderr.count("✗") == 1
    assert sorted(machine.home.rglob("*")) == before


def test_folder_for_temporary_files_that_is_missing_is_one_error(machine: Machine, tmp_path: Path) -> None:
    machine.env["TMPDIR"] = str(tmp_path / "missing")
    done = machine.run("--bundle", str(_bundle(tmp_path, uv=b"wheel")), "--tool-only")
    assert done.returncode == 1 and done.stderr.startswith("✗ no temporary folder can be created: No such file")
    assert "  do    set TMPDIR" in done.stderr


def test_folder_for_the_tool_that_cannot_be_created_is_one_error(machine: Machine) -> None:
    (machine.home / ".local").write_text("a file")
    done = machine.run("--tool-only")
    assert done.returncode == 1 and "  do    " in done.stderr
    assert done.stderr.startswith(f"✗ the folder {machine.home}/.local/share cannot be created: Not a directory")


@pytest.mark.network
def test_bundle_installs_the_command_and_a_rehearsal_without_a_network(tmp_path: Path) -> None:
    """With the real packages of the tool, in a network namespace without a route, as a user whose home is empty.

    `cluster` then installs the tool on a further node from what the bundle has brought.
    """
    maker = Maker(tmp_path, small_stack(tmp_path / "stack"), platform=HERE, real_tool=True)
    maker.created(tmp_path / "b.tar")
    subprocess.run(["tar", "-xf", "b.tar", "sparkinstall"], cwd=tmp_path, check=True)
    home = tmp_path / "home"
    home.mkdir()
    env = {"HOME": str(home), "PATH": os.environ["PATH"], "TMPDIR": str(tmp_path / "temporary")}
    # What pip installs is imported a few times, and most of it never.
    env["PIP_NO_COMPILE"] = "1"
    # A careful machine runs no programs from its temporary folder.
    (tmp_path / "temporary").mkdir()
    strict = ("sh", "-ec", 'mount -t tmpfs -o noexec none temporary; exec "$@"', "sh")
    alone = ("unshare", "--map-root-user", "--net", "--mount", *strict)

    def run(*argv: str, **more: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([*alone, *argv], cwd=tmp_path, env=env | more, capture_output=True, text=True)

    options = ("--root", "./node", "--stack", str(maker.stack), "--set", "nccl.mode=wheel")
    done = run("sh", "sparkinstall/install.sh", "--bundle", "b.tar", *options)
    assert done.returncode == 0, done.stderr
    assert "is done. Next:" in done.stdout
    again = run("sh", "sparkinstall/install.sh", "--bundle", "b.tar", *options)
    assert again.returncode == 0 and "everything is up to date" in again.stdout, again.stderr
    command = home / ".local/bin/sparkinstall"
    assert run(str(command), "verify", "--root", "./node").returncode == 0
    (fresh := tmp_path / "fresh").mkdir()
    reached = FarNodes(tmp_path, REPOSITORY, "").environment()
    planned = run(str(command), "cluster", "plan", "fresh", "--json", LAB=reached["LAB"], PATH=reached["PATH"])
    assert envelope(planned)["data"]["nodes"][0]["tool_brought"], output_of(planned)
    assert (fresh / ".local/share/sparkinstall/tool/bin/sparkinstall").exists()
    assert run(str(command), "uninstall", "--root", "./node").returncode == 0
    assert run("sh", "sparkinstall/install.sh", "--remove").returncode == 0
    assert not command.exists() and not (tmp_path / "node").exists()


# --- removal, and the last lines


def test_remove_twice_removes_once(machine: Machine) -> None:
    assert machine.run("--tool-only").returncode == 0
    assert "Removed the command" in machine.run("--remove").stderr
    assert not machine.command.is_symlink()
    again = machine.run("--remove")
    assert again.returncode == 0
    assert again.stderr.startswith("Nothing to remove")
    assert sorted(path.name for path in (machine.home / ".local").rglob("*")) == ["bin", "share"]


def test_last_lines_tell_how_to_call_the_command(machine: Machine) -> None:
    machine.replace_program("fake-tool", '[ "$1" = all ] || exit 0; echo "all is done" >&2; exit 3')
    done = machine.run("--root", "./node")
    assert done.returncode == 3
    after = done.stderr.partition("all is done\n")[2]
    assert str(machine.command) in after
    assert f'export PATH="{machine.command.parent}:$PATH"' in after
    assert "log in again" not in done.stderr


@pytest.mark.parametrize(
    ("file", "line", "promised"),
    [
        (".profile", '    PATH="$HOME/.local/bin:$PATH"', True),
        (".profile", '# PATH="$HOME/.local/bin:$PATH"', False),
        (".bash_profile", "umask 022", False),
    ],
)
def test_last_lines_advise_to_log_in_again_only_if_that_helps(
    machine: Machine, file: str, line: str, promised: bool
) -> None:
    (machine.home / ".profile").write_text('PATH="$HOME/.local/bin:$PATH"\n')
    (machine.home / file).write_text(f"{line}\n")
    output = machine.run("--tool-only").stderr
    assert ("log in again" in output) is promised
    assert ("export PATH=" in output) is not promised
    assert output.count(str(machine.command)) == 1


def test_last_lines_with_the_command_on_the_path_are_absent(machine: Machine) -> None:
    machine.env["PATH"] += f":{machine.command.parent}"
    assert "PATH" not in machine.run("--root", "./node").stderr


def test_ctrl_c_during_all_is_handled_by_all(machine: Machine) -> None:
    machine.replace_program(
        "fake-tool",
        '[ "$1" = all ] || exit 0; trap \'echo "stopped well" >&2; exit 130\' INT\n'
        "echo up; while :; do /bin/sleep 0.1; done",
    )
    run = machine.start("--root", "./node")
    assert run.stdout is not None
    assert run.stdout.readline() == "up\n"
    os.killpg(run.pid, signal.SIGINT)
    code, output = _ended(run)
    assert code == 130
    assert "stopped well" in output
    assert "interrupted; run it again" not in output


@pytest.mark.network
def test_command_is_installed_once_and_removed(tmp_path: Path) -> None:
    def run(*argv: str) -> int:
        return _run(*argv, HOME=str(tmp_path), XDG_DATA_HOME="", XDG_BIN_HOME="", PIP_NO_COMPILE="1").returncode

    assert run("--tool-only") == 0
    command = tmp_path / ".local/bin/sparkinstall"
    assert "sparkinstall" in subprocess.run([str(command), "--version"], capture_output=True, text=True).stdout
    made = (tmp_path / ".local/share/sparkinstall/tool/made-from").stat().st_mtime_ns
    assert run("--tool-only") == 0
    assert (tmp_path / ".local/share/sparkinstall/tool/made-from").stat().st_mtime_ns == made
    assert run("--remove") == 0
    assert not command.exists()
    assert not (tmp_path / ".local/share/sparkinstall").exists()
