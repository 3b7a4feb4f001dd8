"""The command line: help, version, completion, output, JSON, interrupts."""

import io
import os
import pty
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from rich.console import Console

from sparkinstall import __version__
from sparkinstall.cli import app
from sparkinstall.cli.hints import pointed
from sparkinstall.cli.text_output import show_line, show_rows
from sparkinstall.errors import BadUsage, Interrupted
from sparkinstall.probes import Probe, failed
from tests.support.rehearsals import (
    CHECKOUT,
    command,
    empty_rehearsal,
    envelope,
    environment,
    in_this_process,
    output_of,
    sparkinstall,
)

VERBS = ("all", "plan", "verify", "uninstall", "status", "run", "settings")


def test_version_is_one_line_and_help_names_every_verb() -> None:
    assert sparkinstall("--version").stdout == f"sparkinstall {__version__}\n"
    text = sparkinstall("--help").stdout
    assert all(verb in text for verb in VERBS)
    assert "docs/exit-codes.md" in text


@pytest.mark.parametrize("verb", [v for v in VERBS if v != "settings"])
def test_help_of_a_verb_names_its_options(verb: str) -> None:
    text = sparkinstall(verb, "--help").stdout
    assert "--root" in text
    assert "--json" in text


@pytest.mark.parametrize("verb", [verb for verb, (_, line) in app.VERBS.items() if line])
def test_every_argument_has_its_help(verb: str) -> None:
    found = app.command(verb)
    for each in (found, *getattr(found, "commands", {}).values()):
        assert all(param.help for param in each.params if isinstance(param, click.Argument)), each.name


def test_help_of_an_argument_is_shown() -> None:
    assert "- reads it from stdin" in in_this_process("ask", "--help").stdout
    assert "ORG/NAME" in in_this_process("serve", "start", "--help").stdout


@pytest.mark.parametrize(("words", "says"), [(("ask", ""), "after ask"), (("ask", "x", "--url", ""), "of --url")])
def test_empty_value_is_named_by_what_is_before_it(words: tuple[str, ...], says: str) -> None:
    run = in_this_process(*words)
    assert (run.returncode, f"the value {says} is empty" in output_of(run)) == (2, True), output_of(run)


def test_misspelled_verb_of_a_group_is_suggested_once() -> None:
    run = in_this_process("recipes", "lst")
    assert (run.returncode, output_of(run).count("Did you mean")) == (2, 1)


@pytest.mark.parametrize("terminal", [True, False])
def test_long_text_is_wrapped_between_words_on_a_terminal_only(terminal: bool) -> None:
    written = io.StringIO()
    out = Console(width=30, file=written, force_terminal=terminal, no_color=True, highlight=False)
    show_line("a sentence that is longer than thirty columns", out)
    show_rows([("versions", "vllm 0.29.0, torch 2.13.0")], out, 8)
    lines = [line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", written.getvalue()).splitlines()]
    if terminal:
        assert lines == [
            "a sentence that is longer than", "thirty columns", "  versions  vllm 0.29.0, torch", "            2.13.0",
        ]  # fmt: skip
    else:
        assert lines == ["a sentence that is longer than thirty columns", "  versions vllm 0.29.0, torch 2.13.0"]


def test_cluster_usage_line_names_its_verbs() -> None:
    run = sparkinstall("cluster", COLUMNS="120")
    assert run.returncode == 2
    usage = next(line for line in run.stderr.splitlines() if "Usage:" in line)
    assert "[ plan|verify|status|uninstall ] HOST..." in usage


@pytest.mark.parametrize(
    ("word", "verb"), [("pln", "plan"), ("PLAN", "plan"), ("verfy", "verify"), ("statsu", "status")]
)
def test_cluster_misspelled_verb_is_no_host(word: str, verb: str) -> None:
    run = in_this_process("cluster", word, "spark-1", "spark-2", "--json")
    (error,) = envelope(run)["errors"]
    assert (run.returncode, error["message"]) == (2, f"`cluster` has no verb `{word}`")
    assert f"did you mean the verb `{verb}`?" in error["hint"] and f"`USER@{word}`" in error["hint"]


@pytest.mark.parametrize("words", [["spark-1", "spark-2"], ["pln"], ["me@pln", "spark-2"], ["192.168.1.7", "spark-2"]])
def test_cluster_host_is_no_misspelled_verb(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(hosts: list[str], *_: object, **__: object) -> None:
        raise BadUsage(f"hosts: {hosts}")

    monkeypatch.setattr("sparkinstall.cli.cluster._opened", opened)
    assert envelope(in_this_process("cluster", *words, "--json"))["errors"][0]["message"] == f"hosts: {words}"


def test_completion_in_bash_completes_a_verb() -> None:
    # The shell is detected from the parent processes, so there must be one.
    typed = f"{shlex.join(command('--show-completion'))}; exit $?"
    shown = subprocess.run(["bash", "-c", typed], env=environment(), capture_output=True, text=True, check=False)
    assert "_SPARKINSTALL_COMPLETE" in shown.stdout
    words = sparkinstall(_SPARKINSTALL_COMPLETE="complete_bash", COMP_WORDS="sparkinstall un", COMP_CWORD="1")
    assert "uninstall" in words.stdout


@pytest.mark.parametrize("verb", app.VERBS)
def test_only_the_whole_command_line_offers_completion(verb: str) -> None:
    assert "completion" in in_this_process("--help").stdout
    assert "completion" not in in_this_process(verb, "--help").stdout


def test_version_does_not_import_typer() -> None:
    code = "import sys; from sparkinstall.__main__ import main; main(); print('typer' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "--version"], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("False\n")


@pytest.mark.parametrize("verb", [["plan"], ["status"], ["verify"], ["settings", "show"], ["uninstall"]])
def test_json_of_every_verb_is_one_envelope(verb: list[str], tmp_path: Path) -> None:
    answer = envelope(sparkinstall(*verb, "--json", "--root", tmp_path / "node"))
    assert answer["version"] == 1
    assert answer["command"] == " ".join(verb)
    assert not (tmp_path / "node").exists()


def test_plan_with_detailed_exitcode_exits_3_on_drift(tmp_path: Path) -> None:
    assert sparkinstall("plan", "--root", tmp_path / "node").returncode == 0
    assert sparkinstall("plan", "--root", tmp_path / "node", "--detailed-exitcode").returncode == 3


def test_plan_last_line_says_what_all_would_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparkinstall.probes.preflight.preflight", lambda _: [])
    root = tmp_path / "node"
    last = in_this_process("plan", "--root", root).stdout.splitlines()[-1]
    assert re.fullmatch(rf"\d steps would be changed: `sparkinstall all --root {root}`", last)
    one = in_this_process("plan", "--root", root, "--only", "env-files").stdout.splitlines()[-1]
    assert one == f"1 step would be changed: `sparkinstall all --only env-files --root {root}`"
    link = root / str(Path.home())[1:] / "vllm-env"
    link.parent.mkdir(parents=True)
    link.symlink_to("/elsewhere")
    last = in_this_process("plan", "--root", root).stdout.splitlines()[-1]
    assert last == f"`sparkinstall all --root {root}` would stop at environment: see above"
    bad = Probe("clock", "x", lambda _: failed("it is 1970", "set it"), "static")
    monkeypatch.setattr("sparkinstall.probes.preflight.preflight", lambda _: [bad])
    last = in_this_process("plan", "--root", root, "--only", "env-files").stdout.splitlines()[-1]
    assert last.endswith("would stop before the first: clock")


@pytest.mark.parametrize("verb", [["plan"], ["plan", "--json"], ["status"], ["verify"]])
def test_output_to_a_full_disk_is_one_line_on_stderr(verb: list[str], tmp_path: Path) -> None:
    empty_rehearsal(tmp_path / "node")
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            command(*verb, "--root", tmp_path / "node"), cwd=CHECKOUT, env=environment(), stdin=subprocess.DEVNULL,
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert (run.returncode, run.stderr) == (1, "✗ writing the output failed: the disk is full\n")


@pytest.mark.parametrize("verb", ["plan", "verify", "doctor", "status", "support-bundle", "all", "run"])
@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, lambda: Interrupted("interrupted")], ids=["key", "thread"])
def test_interrupt_says_whether_the_next_run_continues(
    verb: str, interrupt: Callable[[], BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise interrupt()

    monkeypatch.setattr("sparkinstall.core.session._root", interrupted)
    options = ["nccl"] if verb == "run" else ["--output", str(tmp_path / "x")] if verb == "support-bundle" else []
    run = in_this_process(verb, "--root", tmp_path / "node", *options)
    assert run.returncode == 130, output_of(run)
    assert ("continues where this one stopped" in output_of(run)) == (verb in ("all", "run")), output_of(run)
    assert ("nothing was changed" in output_of(run)) == (verb not in ("all", "run")), output_of(run)


def test_settings_show_the_source_of_each_value(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("nccl:\n  jobs: 3\n")
    options = ("--root", tmp_path / "node", "--config", config, "--set", "nccl.arch=90")
    rows = envelope(sparkinstall("settings", "show", "--json", *options))["data"]["settings"]
    assert rows["nccl.jobs"] == {"value": 3, "source": str(config)}
    assert rows["nccl.arch"] == {"value": "90", "source": "the command line"}
    assert rows["prefix"]["source"] == "default"


def test_colour_is_printed_on_a_terminal_only(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "sparkinstall", "plan", "--root", str(tmp_path / "node")]
    primary, secondary = pty.openpty()
    with subprocess.Popen(argv, cwd=CHECKOUT, env=environment(TERM="xterm-256color"), stdout=secondary) as process:
        os.close(secondary)
        seen = b""
        while chunk := _read(primary):
            seen += chunk
    os.close(primary)
    assert process.returncode == 0
    assert b"\x1b[" in seen
    assert "\x1b[" not in sparkinstall("plan", "--root", tmp_path / "node").stdout


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # a terminal whose other side is closed answers with EIO
        return b""


def test_output_to_a_closed_pipe_is_no_traceback(tmp_path: Path) -> None:
    command = f"{sys.executable} -m sparkinstall plan -v --root {tmp_path}/node | head -n 1"
    done = subprocess.run(["bash", "-c", command], env=environment(), cwd=CHECKOUT, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_help_imports_no_library_that_only_verbs_need() -> None:
    heavy = {"yaml", "jinja2", "requests", "plumbum", "rich", "msgspec"}
    code = f"import sys, sparkinstall.cli.app; print(*{heavy!r} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=CHECKOUT, text=True) == "\n"


def test_list_of_recipes_loads_no_step_of_an_installation(tmp_path: Path) -> None:
    words = ["sparkinstall", "recipes", "--root", str(tmp_path / "node")]
    code = (
        f"import sys; sys.argv = {words!r}; from sparkinstall.__main__ import main\n"
        "try: main()\n"
        "finally: print(*(name for name in sys.modules if name.startswith('sparkinstall.')), file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    loaded = set(run.stderr.split())
    assert "sparkinstall.recipes.catalogue" in loaded
    assert not {"sparkinstall.core.catalogue", "sparkinstall.core.converge", "sparkinstall.cluster.protocol"} & loaded


@pytest.mark.parametrize("name", [name for name, (_, line) in app.VERBS.items() if line])
def test_help_of_the_group_equals_that_of_the_verb(name: str) -> None:
    assert (app.command(name).help or "").splitlines()[0] == app.VERBS[name][1]


@pytest.mark.parametrize("line", [*app.VERBS, "bench 58/2", "settings show", "run nccl --force", "--help", "-v"])
def test_command_in_a_hint_gets_the_root_if_its_verb_takes_one(line: str) -> None:
    groups = ("cluster", "bundle", "cache", "monitoring", "settings", "recipes", "models", "serve", "node")
    takes_root = line not in (*groups, "--help", "-v")
    text, root = "see `sparkinstall {}` and `apt`", " --root ./node"
    expected = text.format(line + root if takes_root else line)
    assert pointed(text.format(line), root) == expected
    assert pointed(expected, root) == expected
    assert pointed(text.format(line), "") == text.format(line)
