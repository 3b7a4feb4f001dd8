"""Every verb in every environment: a documented exit code and one sentence, never a traceback."""

import errno
import os
import pty
import re
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

from sparkinstall import given
from sparkinstall.cli import app, edge
from sparkinstall.cluster import ssh
from sparkinstall.cluster.artifacts import understood
from sparkinstall.cluster.file_server import CopyFailed
from sparkinstall.cluster.protocol import Introduction, announced
from sparkinstall.cluster.remote import Member, RemoteNode
from sparkinstall.core.status import NodeStatus
from sparkinstall.errors import BadUsage, Exit, Problem
from tests.support import forks
from tests.support.mounts import need_root
from tests.support.rehearsals import (
    CHECKOUT,
    as_ordinary_user,
    command,
    empty_rehearsal,
    envelope,
    environment,
    in_this_process,
    output_of,
    sparkinstall,
)
from tests.support.waiting import until

USAGE = 2

# A quick form of each verb; `{root}` is a rehearsal. A verb that is not named here is called without arguments.
QUICK = {
    "all": "--root {root} --only packages --yes",
    "multi-node": "--root {root} --role head --only packages --yes",
    "cluster": "status 127.0.0.1:1",
    "plan": "--root {root} --only env-files",
    "verify": "--root {root} --only env-files",
    "doctor": "--root {root} --only env-files",
    "diagnose": "-",
    "support-bundle": "--root {root} --level static --output {root}.tar.gz --yes",
    "uninstall": "--root {root} --yes",
    "status": "--root {root}",
    # Without `--once` it goes on until Ctrl-C.
    "watch": "--root {root} --once --interval 0.2 --url http://127.0.0.1:1",
    "run": "packages --root {root} --yes",
    "settings show": "--root {root}",
    # Refused before anything is downloaded.
    "bundle create": "--since {root}/no.tar --yes",
    "node attend": "",
}


def verbs() -> Iterator[str]:
    """Every registered verb; of a group, the first of its verbs and those of `QUICK`."""
    for name in app.VERBS:
        found = app.command(name)
        inner = list(found.commands) if isinstance(found, click.Group) else []
        some = [each for each in inner if f"{name} {each}" in QUICK] or inner[:1]
        yield from (f"{name} {each}" for each in some)
        if not inner:
            yield name


VERBS = list(verbs())


def words(verb: str, root: Path) -> list[str]:
    return [*verb.split(), *QUICK.get(verb, "").format(root=root).split()]


def well_answered(code: int, said: str) -> None:
    """A documented exit code, and no sign of a crash."""
    assert code in set(Exit), said
    for sign in ("Traceback", "internal error", "Exception ignored", "Fatal Python error", "pipe:["):
        assert sign not in said, said
    assert len(said) < 100_000


def is_explained(said: str) -> bool:
    """Whether one line says what is wrong."""
    return bool(re.search(r"(?m)^(✗|Error:|\? )", said))


# --- streams, variables, limits


def no_folder() -> None:
    """Remove the current folder."""
    os.mkdir(gone := f"{os.environ.get('TMPDIR', '/tmp')}/gone-{os.getpid()}")
    os.chdir(gone)
    os.rmdir(gone)


def limited(what: int, to: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(what, (to, to))


def closed(*numbers: int) -> Callable[[], None]:
    def close() -> None:
        for number in numbers:
            os.close(number)

    return close


def full(*numbers: int) -> Callable[[], None]:
    def fill() -> None:
        device = os.open("/dev/full", os.O_RDWR)
        for number in numbers:
            os.dup2(device, number)

    return fill


def readerless(number: int) -> Callable[[], None]:
    def give() -> None:
        read, write = os.pipe()
        os.dup2(write, number)
        os.close(read)
        os.close(write)

    return give


def narrow() -> None:
    """Let stdout and stderr be a terminal without a width; what it shows is lost."""
    primary, secondary = pty.openpty()
    os.set_inheritable(primary, True)
    os.dup2(secondary, 1)


# What to do in the new process before Python starts, and variables: None is "not set".
ENVIRONMENTS: dict[str, tuple[Callable[[], None] | None, dict[str, str | None]]] = {
    "stdin closed": (closed(0), {"COLUMNS": "9" * 30, "TERM": "\x1b", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}),
    "stdout closed": (closed(1), {}),
    "stderr closed": (closed(2), {}),
    "all streams closed": (closed(0, 1, 2), {}),
    "stdout full": (full(1), {}),
    "stderr full": (full(2), {}),
    "both full": (full(1, 2), {}),
    "stdout without a reader": (readerless(1), {}),
    "terminal without a width": (narrow, {"COLUMNS": None}),
    "no current folder": (no_folder, {}),
    "no home": (None, {"HOME": "", "XDG_CACHE_HOME": None, "COLUMNS": "0", "LINES": "0"}),
    "home is too long": (None, {"HOME": "/h" * 2500, "XDG_CACHE_HOME": "cache", "COLUMNS": "-1"}),
    "no variables": (None, {"PATH": None, "HOME": None, "LANG": None, "LC_ALL": None, "TERM": None}),
    "no file may be written": (limited(resource.RLIMIT_FSIZE, 0), {}),
    "few files may be open": (limited(resource.RLIMIT_NOFILE, 12), {}),
    "too little memory for a thread": (limited(resource.RLIMIT_AS, 72 << 20), {}),
    "unknown value for the completion of click": (None, {"_SPARKINSTALL_COMPLETE": "x"}),
}


# What is special for a verb is its files. Streams, limits and the rest of the variables are handled at the edge of the
# process, once for all verbs.
ABOUT_HOME = ("no home", "home is too long")


def in_environment(name: str, *args: str) -> subprocess.CompletedProcess[str]:
    before, variables = ENVIRONMENTS[name]
    # Not the cache of who runs the tests, which is large.
    chosen = {**environment(), "XDG_CACHE_HOME": "/nowhere/cache", **variables}
    env = {key: value for key, value in chosen.items() if value is not None}
    if name in ABOUT_HOME:
        return forks.run("sparkinstall", args, env, 300)
    return subprocess.run(
        command(*args), env=env, preexec_fn=before, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        errors="replace", timeout=300, check=False,
    )  # fmt: skip


def pairs() -> Iterator[tuple[str, str]]:
    """Every verb in each environment about its home, and in three others: so each other meets at least four verbs."""
    others = [name for name in ENVIRONMENTS if name not in (*ABOUT_HOME, "both full")]
    for at, verb in enumerate(VERBS):
        yield from ((verb, name) for name in ABOUT_HOME)
        yield from ((verb, others[(at + more) % len(others)]) for more in (0, 5, 9))


def test_every_environment_meets_several_verbs() -> None:
    met = [name for _, name in pairs()]
    assert all(met.count(name) >= 4 for name in ENVIRONMENTS if name != "both full")


@pytest.mark.parametrize(("verb", "name"), list(pairs()))
def test_verb_in_an_environment_gives_a_documented_answer(verb: str, name: str, tmp_path: Path) -> None:
    run = in_environment(name, *words(verb, tmp_path / "node"))
    well_answered(run.returncode, output_of(run))
    told = not any(word in name for word in ("stderr", "all", "reader"))
    if run.returncode in (Exit.FAILED, USAGE, Exit.INTERRUPTED) and told:
        assert is_explained(run.stderr), output_of(run)


@pytest.mark.parametrize("args", [["plan", "--nonsense"], ["plan", "--nonsense", "--json"], ["--help"], ["--version"]])
@pytest.mark.parametrize("name", ["all streams closed", "stdout full", "both full", "stdout without a reader"])
def test_command_line_without_a_verb_gives_a_documented_answer(args: list[str], name: str) -> None:
    run = in_environment(name, *args)
    well_answered(run.returncode, output_of(run))
    if name == "stdout full" and "--json" in args:
        assert (run.returncode, run.stderr) == (1, "✗ writing the output failed: the disk is full\n")


@pytest.mark.parametrize("columns", ["0", "1", "x", "9" * 5000])
@pytest.mark.parametrize("args", [["plan", "--nonsense"], ["plan", "--help"], ["--help"]])
def test_usage_and_help_are_shown_at_any_width(columns: str, args: list[str]) -> None:
    run = sparkinstall(*args, COLUMNS=columns)
    assert len(output_of(run).split()) > 10 and len(output_of(run)) < 20_000


@pytest.mark.parametrize("verb", ["plan", "status", "settings show", "diagnose"])
def test_verb_with_closed_stdin_works_unless_it_reads_stdin(verb: str, tmp_path: Path) -> None:
    run = in_environment("stdin closed", *words(verb, tmp_path / "node"))
    assert run.returncode == (USAGE if verb == "diagnose" else 0), output_of(run)
    assert ("stdin cannot be read" in run.stderr) == (verb == "diagnose")


@pytest.mark.parametrize("verb", ["plan", "status", "settings show"])
def test_verb_in_a_deleted_folder_works_with_absolute_paths(verb: str, tmp_path: Path) -> None:
    assert in_environment("no current folder", *words(verb, tmp_path / "node")).returncode == 0
    run = in_environment("no current folder", *words(verb, Path("node")))
    assert run.returncode == USAGE and "the folder that you are in is gone" in run.stderr, output_of(run)


def test_all_goes_on_where_its_progress_cannot_be_shown(tmp_path: Path) -> None:
    for name in ("stderr full", "stderr closed"):
        run = in_environment(name, *words("all", tmp_path / "node"))
        assert run.returncode == 0, output_of(run)


@pytest.mark.parametrize("verb", ["plan", "status", "settings show", "uninstall", "support-bundle", "diagnose"])
def test_user_without_home_and_passwd_entry_is_told(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: int) -> None:
        raise KeyError

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    run = in_this_process(*words(verb, empty_rehearsal(tmp_path / "node")))
    well_answered(run.returncode, output_of(run))
    assert ("you have no home folder: HOME is not set" in run.stderr) == (verb not in ("uninstall", "diagnose"))
    assert verb != "uninstall" or run.returncode == 0, "nobody is kept from undoing"


def test_installation_that_is_not_whole_is_told(tmp_path: Path) -> None:
    """A package that is missing, damaged, or not readable for this user."""
    for name, content in (("typer", "raise ImportError('no typer')"), ("msgspec", "("), ("yaml", "1/0")):
        (tmp_path / f"{name}.py").write_text(content)
        path = f"{tmp_path}:{CHECKOUT}"
        for args in (["plan", "--root", str(tmp_path / "node")], ["status", "--json"]):
            run = sparkinstall(*args, PYTHONPATH=path)
            assert "Traceback" not in output_of(run) and run.returncode == 1, output_of(run)
            assert is_explained(run.stderr) and len(run.stderr.splitlines()) <= 2
            assert "--json" not in args or envelope(run)["errors"][0]["message"]
        (tmp_path / f"{name}.py").unlink()


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EMFILE, "Too many open files")], ids=repr)
def test_limit_that_keeps_the_program_from_starting_is_named(error: BaseException) -> None:
    message, hint = edge.cannot_start(error)
    assert re.fullmatch("sparkinstall cannot start: .*(memory|open files)", message) and "`ulimit -a`" in hint


# --- paths


def odd_paths(folder: Path) -> dict[str, str]:
    """Paths that no verb can use."""
    (folder / "loop").symlink_to("loop")
    (folder / "one").symlink_to("other")
    (folder / "other").symlink_to("one")
    (folder / "dangling").symlink_to("/nowhere/at/all")
    (folder / "file").touch()
    os.mkfifo(folder / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket"))
    return {
        "loop": str(folder / "loop"),
        "below a loop": str(folder / "one/below"),
        "dangling": str(folder / "dangling"),
        "below a file": str(folder / "file/below"),
        "long name": str(folder / ("n" * 300)),
        "long path": str(folder) + "/n" * 3000,
        "unknown user": "~no-such-user/x",
        "empty": "",
        "pipe": str(folder / "fifo"),
        "socket": str(folder / "socket"),
        "not UTF-8": os.fsdecode(os.fsencode(folder) + b"/no/\xff"),
        "escapes": str(folder / "no/\x1b[31m"),
        "endless": "/dev/zero",
        "full": "/dev/full/x",
    }


def options_with_paths() -> Iterator[tuple[str, str]]:
    """Each verb with each of its options that take a path."""
    for verb in VERBS:
        found = app.command(verb.split()[0])
        if isinstance(found, click.Group):
            found = found.commands[verb.split()[1]]
        for each in found.params:
            named = each.name in ("root", "config", "junit", "archive", "token_file")
            # A bundle reports what it could not read, also the config.
            if named and (verb, each.name) != ("support-bundle", "config"):
                yield verb, each.opts[0]


@pytest.mark.parametrize(("verb", "option"), list(options_with_paths()))
def test_odd_path_is_refused_in_one_sentence(
    verb: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(given, "PATIENCE", 0.05)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    usable = {"--output": ("dangling",), "--junit": ("endless",)}.get(option, ())
    of_token = ["--role", "worker", "--only", "ray"] if option == "--token-file" else []
    for kind, path in odd_paths(tmp_path).items():
        args = [*words(verb, tmp_path / "node"), *of_token, option, path]
        run = in_this_process(*args)
        well_answered(run.returncode, output_of(run))
        if kind in usable:
            continue
        assert run.returncode, f"{kind}: {output_of(run)}"
        assert is_explained(run.stderr), f"{kind}: {output_of(run)}"
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", run.stderr), kind
        assert len(run.stderr) < 2000, f"{kind}: {run.stderr}"
        if verb != "cluster":
            assert run.returncode in (Exit.FAILED, USAGE), f"{kind}: {output_of(run)}"
    assert not (tmp_path / "node").exists()


def test_path_of_a_config_that_another_option_replaces_need_not_be_readable(tmp_path: Path) -> None:
    need_root()
    hidden = tmp_path / "hidden"
    hidden.mkdir(mode=0o700)
    os.chown(hidden, 65534, 65534)
    (tmp_path / "config.yaml").write_text(f"stack: {hidden}/stack.yaml\n")
    shown = ("settings", "show", "--config", tmp_path / "config.yaml")
    assert as_ordinary_user(*shown, "--stack", "0.33.0").returncode == 0
    refused = as_ordinary_user("plan", "--root", tmp_path / "node", *shown[2:])
    assert (refused.returncode, "hidden/stack.yaml" in refused.stderr) == (USAGE, True), output_of(refused)


@pytest.mark.parametrize("below", ["new.xml", "old.xml"])
def test_report_in_a_folder_of_another_user_names_the_way_out(below: str, tmp_path: Path) -> None:
    need_root()
    root, hidden = empty_rehearsal(tmp_path / "node"), tmp_path / "hidden"
    hidden.mkdir(mode=0o700)
    (hidden / "old.xml").touch()
    for mode in (0o700, 0o755):
        hidden.chmod(mode)
        for path in (hidden, hidden / "old.xml"):
            os.chown(path, 65534, 65534)
        run = as_ordinary_user("verify", "--root", root, "--only", "env-files", "--junit", hidden / below)
        assert run.returncode == Exit.FAILED, output_of(run)
        assert run.stderr == (
            f"✗ writing {hidden / below} failed: permission denied\n"
            "  do    choose a folder that you can write to: `--junit FILE.xml`\n"
        )


@pytest.mark.parametrize("kind", ["loop", "below a loop", "below a file", "long name", "long path", "unknown user"])
def test_log_that_cannot_be_read_is_refused_in_one_sentence(kind: str, tmp_path: Path) -> None:
    run = in_this_process("diagnose", odd_paths(tmp_path)[kind])
    well_answered(run.returncode, output_of(run))
    assert run.returncode == USAGE and is_explained(run.stderr) and len(run.stderr) < 2000, output_of(run)


def test_log_from_a_pipe_is_read_whole() -> None:
    shell = f"{' '.join(command('diagnose', '--json'))} <(echo 0123456789; echo 0123456789)"
    run = subprocess.run(["bash", "-c", shell], env=environment(), cwd=CHECKOUT, capture_output=True, text=True)
    assert envelope(run)["data"]["logs"][0]["bytes"] == 22, output_of(run)


@pytest.mark.parametrize("args", [["plan", "--root="], ["all", "--root", ""], ["diagnose", ""], ["run", ""]])
def test_empty_argument_is_refused(args: list[str]) -> None:
    run = in_this_process(*args)
    assert run.returncode == USAGE and "is empty" in run.stderr, output_of(run)


def test_config_from_a_pipe_is_read_once_and_not_remembered(tmp_path: Path) -> None:
    root = empty_rehearsal(tmp_path / "node")
    for source in ("<(echo 'hub: {offline: true}')", "/dev/stdin"):
        shell = f'"$@" --config {source} --json'
        for verb, code in (("settings show", 0), ("all", USAGE)):
            run = subprocess.run(
                ["bash", "-c", shell, "bash", *command(*words(verb, root))], input="hub: {offline: true}\n",
                cwd=CHECKOUT, env=environment(), capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert run.returncode == code, output_of(run)
            if code:
                assert "is not a regular file" in envelope(run)["errors"][0]["message"]
            else:
                assert envelope(run)["data"]["settings"]["hub.offline"]["value"] is True
    assert not (root / "var/lib/sparkinstall/options.json").exists()


def test_config_from_a_pipe_without_a_writer_is_refused_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(given, "PATIENCE", 0.2)
    os.mkfifo(tmp_path / "fifo")
    run = in_this_process("settings", "show", "--config", tmp_path / "fifo")
    assert run.returncode == USAGE and "has no end within" in run.stderr, output_of(run)


@pytest.mark.parametrize("file", ["/dev/zero", "/dev/full", "/dev/null", "/dev/stdin"])
def test_token_file_without_end_is_refused(file: str, tmp_path: Path) -> None:
    args = ("multi-node", "--root", tmp_path / "node", "--role", "worker", "--only", "ray", "--token-file", file)
    run = sparkinstall(*args, "--yes")
    well_answered(run.returncode, output_of(run))
    assert run.returncode and f"--token-file {file} contains no token" in output_of(run), output_of(run)


# --- sizes


@pytest.mark.parametrize("text", ["x" * 900_000, "x y " * 200_000, "ä" * 100_000, "\n".join(["line"] * 50_000)])
def test_problem_is_short_whatever_it_names(text: str) -> None:
    problem = Problem(f"there is no {text}", cause=text, hint=f"use `{text}`", output=[text])
    for field in (problem.message, problem.cause, problem.hint, *problem.output):
        assert len(field) < 4000
        assert field[:4] in f"there is no {text} use `{text}`" and field


@pytest.mark.parametrize(
    "setting", ["stack", "prefix", "nccl.source", "network.interface", "serving.model", "cluster.head", "nonsense"]
)
def test_error_about_a_long_value_is_short(setting: str, tmp_path: Path) -> None:
    section, _, name = setting.rpartition(".")
    value = "v/" * 100_000
    (tmp_path / "c.yaml").write_text(f"{section}: {{{name}: '{value}'}}" if section else f"{name}: '{value}'")
    for json in ((), ("--json",)):
        run = in_this_process("plan", "--root", tmp_path / "node", "--config", tmp_path / "c.yaml", *json)
        assert len(output_of(run)) < 20_000, len(output_of(run))


# --- interrupts


@pytest.mark.parametrize("verb", [["plan"], ["--help"], ["diagnose", "-"], ["all", "--yes"], ["plan", "--json"]])
def test_interrupt_at_any_moment_of_the_start_is_one_sentence(verb: list[str], tmp_path: Path) -> None:
    root = ["--root", str(tmp_path / "node"), "--only", "packages"] if verb[0] in ("plan", "all") else []
    interrupted = 0
    for moment in range(6):
        with subprocess.Popen(
            command(*verb, *root), cwd=CHECKOUT, env=environment(PYTHONVERBOSE=""), stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as run:  # fmt: skip
            _wait_for_handler(run)
            time.sleep(moment * 0.03)
            run.send_signal(signal.SIGINT if moment % 3 else signal.SIGTERM)
            out, err = run.communicate(timeout=300)
        well_answered(run.returncode, out + err)
        assert run.returncode in (0, 130), out + err
        if run.returncode == 130:
            interrupted += 1
            assert err.startswith("✗ interrupted") or "interrupted" in out, out + err
    assert interrupted


def _wait_for_handler(run: "subprocess.Popen[str]") -> None:
    """Wait until the program has a handler of its own for TERM: before that the signal ends Python itself."""

    def handles() -> int:
        # A program that has ended has no such line, or no such file.
        status = Path(f"/proc/{run.pid}/status").read_text() if run.poll() is None else ""
        caught = re.search(r"SigCgt:\s*(\w+)", status)
        return int(caught[1], 16) >> (signal.SIGTERM - 1) & 1 if caught else 1

    until(handles, during=run, pause=0.001)


def test_hangup_is_ignored_below_nohup() -> None:
    run = subprocess.Popen(
        ["nohup", *command("diagnose", "-")], cwd=CHECKOUT, env=environment(), stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    _wait_for_handler(run)
    time.sleep(0.3)
    run.send_signal(signal.SIGHUP)
    out, _ = run.communicate("", timeout=300)
    assert run.returncode == 0, out


@pytest.mark.parametrize(("value", "why"), [("home", "HOME is 'home'"), ("~", "HOME is '~'"), ("h" * 5000, "HOME is")])
def test_home_that_is_no_absolute_path_is_refused(value: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", value)
    with pytest.raises(BadUsage, match=f"you have no home folder: {why}") as found:
        given.home()
    assert len(found.value.message) < 200


def test_absolute_names_the_option_and_the_path() -> None:
    with pytest.raises(BadUsage, match=r"^--root ~no-such-user/x cannot be used: there is no user 'no-such-user'$"):
        given.absolute("~no-such-user/x", "--root")


# --- the other end of a cluster


@pytest.mark.parametrize("request_", ["", "garbage", "garbage\n", "[" * 100_000 + "\n", '{"argv": 1}\n', "\0\n"])
def test_request_that_is_none_ends_without_a_traceback(request_: str) -> None:
    run = forks.run("sparkinstall", ("node", "attend"), environment(), 300, stdin=request_.encode())
    well_answered(run.returncode, output_of(run))
    assert run.returncode == Exit.FAILED
    assert is_explained(run.stderr) and "found no request" in run.stderr, output_of(run)


@pytest.mark.parametrize(
    "script",
    ["head -c 9000000 /dev/zero", "head -c 300000 /dev/zero >&2", "printf '%0300000d' 0 | tr 0 '['", "echo '\\0'", ":"],
)
def test_reply_of_a_node_is_bounded(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ssh").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setattr(ssh, "_LONGEST_REPLY", 1 << 20)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    lines: list[str] = []
    node = RemoteNode(Member("spark-1", "head", 0, "192.168.100.10"), ssh.Ssh("spark-1", None))
    with pytest.raises(Problem, match="gave no reply on spark-1") as found:
        node.call(NodeStatus, "status", on_line=lines.append, bring=False)
    assert all(len(line) <= 1 << 16 for line in lines)
    assert sum(map(len, found.value.output)) < 40_000


@pytest.mark.parametrize("text", ["[" * 60_000, '{"a":' * 10_000, "", "\0", "9" * 5000])
def test_message_of_a_node_that_is_none_is_no_message(text: str) -> None:
    assert announced(text, Introduction) is None
    with pytest.raises(CopyFailed, match="list of files cannot be read"):
        understood(text.encode())


# --- words of the shell, and of other nodes


def test_unknown_completion_does_not_matter(tmp_path: Path) -> None:
    run = in_environment("unknown value for the completion of click", "status", "--root", str(tmp_path))
    assert run.returncode == 0, output_of(run)


@pytest.mark.parametrize("mebibytes", range(30, 62, 4))
def test_too_little_memory_is_named(mebibytes: int) -> None:
    run = subprocess.run(
        command("stacks"), env=environment(), preexec_fn=limited(resource.RLIMIT_AS, mebibytes << 20),
        capture_output=True, text=True, errors="replace", timeout=300, check=False,
    )  # fmt: skip
    if run.returncode in set(Exit) and "sparkinstall" in run.stderr + run.stdout:
        well_answered(run.returncode, output_of(run))
        assert "not whole" not in run.stderr


@pytest.mark.parametrize("verb", ["fetch", "offer", "ask x y 1", "ask tcp y 1", "respond x", "reach -- -x", "token"])
@pytest.mark.parametrize("stdin", [b"", b"\xff\xda\x00" * 99, b"[" * 9000, b'{"port": "x"}\n', b"\n" * 9])
def test_node_verb_with_garbage_gives_a_documented_answer(verb: str, stdin: bytes) -> None:
    run = forks.run("sparkinstall", ("node", *verb.split()), environment(), 300, stdin=stdin)
    well_answered(run.returncode, output_of(run))


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/urandom", "/dev/full"])
def test_device_is_no_log(device: str) -> None:
    run = sparkinstall("diagnose", device)
    assert run.returncode == USAGE and f"{device} is a device" in run.stderr, output_of(run)


def test_empty_device_is_an_empty_log() -> None:
    assert sparkinstall("diagnose", os.devnull).returncode == 0


@pytest.mark.parametrize("token", ["0123456789abcdef" * 4, "s3same-" + "x" * 300, "a/b\n" * 99])
def test_token_in_the_place_of_its_file_is_not_repeated(token: str, tmp_path: Path) -> None:
    args = ("multi-node", "--root", tmp_path / "node", "--role", "worker", "--only", "ray", "--token-file", token)
    for more in ((), ("--json",)):
        run = sparkinstall(*args, *more)
        assert run.returncode == USAGE, output_of(run)
        assert token[:12] not in output_of(run) and "--token-file" in output_of(run)
