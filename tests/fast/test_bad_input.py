"""Bad input: exit 2 or 4, one sentence with a hint, no traceback, and no change."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sparkinstall import given
from tests.support.cuda_toolkit import toolkit
from tests.support.mounts import need_root
from tests.support.rehearsals import (
    CHECKOUT,
    SETTINGS,
    Rehearsal,
    envelope,
    environment,
    everything_with_times,
    in_this_process,
    output_of,
    sparkinstall,
    tree,
)
from tests.support.tiny_stack import no_index, tiny_stack

USAGE, PREFLIGHT = 2, 4
VERBS = (["all"], ["plan"], ["verify"], ["status"], ["settings", "show"], ["run", "env-files"])


def refused(around: Path, *args: str | Path, code: int = USAGE) -> dict[str, str]:
    """Run the command as text and as JSON, check what holds for every refusal, and return the one error."""
    first = tree(around, everything_with_times)
    shown, as_json = in_this_process(*args), in_this_process(*args, "--json")
    assert tree(around, everything_with_times) == first, "a file was changed"
    assert (shown.returncode, as_json.returncode) == (code, code), output_of(shown) + output_of(as_json)
    assert "Traceback" not in output_of(shown) + output_of(as_json)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", shown.stderr), "a control character reached the terminal"
    errors = envelope(as_json)["errors"]
    assert len(errors) == 1 and len(errors[0]["message"].splitlines()) == 1
    assert errors[0]["message"].split()[0] in shown.stderr
    return dict(errors[0])


def config_of(tmp_path: Path, content: bytes | str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# --- settings


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("nccl:\n  archs: 121", "`nccl.archs` .* `nccl.arch`"),
        ("prefx: /opt/x", "`prefx` .* `prefix`"),
        ("arch: 121", "`arch` .* `nccl.arch`"),
        ("nccl: [1]", "`nccl` is a section"),
        ("prefix: 5", "`prefix` must be text, not 5"),
        ("nccl: {jobs: many}", "line 1: `nccl.jobs` must be a number from 0 to 1024, not 'many'"),
        ("nccl: {jobs: true}", "`nccl.jobs` must be a number from 0 to 1024, not True"),
        ("nccl: {arch: 121}", '`nccl.arch` must be an architecture number .*, not 121 .*"121"'),
        ("hub: {offline: maybe}", "`hub.offline` must be true or false"),
        ("packages: {extra: htop}", "`packages.extra` must be a list, each item a Debian package name"),
        ("packages: {extra: [htop, 5]}", r"`packages.extra\[1\]` must be a Debian package name, not 5"),
        ("packages: {extra: [-oDpkg::Pre-Invoke=id]}", r"`packages.extra\[0\]` must be a Debian package name"),
        ("cluster: {ray_port: 70000}", "`cluster.ray_port` must be a port"),
        ("nccl: {mode: maybe}", "`nccl.mode` must be one of source, wheel"),
        ("environment: {link: elsewhere}", "`environment.link` must be an absolute path"),
        ("environment: {link: ~/../x}", "`environment.link` must be an absolute path"),
        ("- a list", "must be `key: value` lines, not a list"),
        ("just words", "must be `key: value` lines, not a str"),
        ("nccl: {mode: wheels}", "`nccl.mode` must be one of source, wheel, not 'wheels' did you mean `wheel`"),
        ("a: [1", "is not YAML: .*line"),
        ("nccl:\n\tmode: wheel", "is not YAML: there is a tab in line 2 .*spaces"),
        ("nccl:\n  mode: wheel\n  \tjobs: 1", "is not YAML: there is a tab in line 3 .*spaces"),
        ("nccl:\n  mode: wheel\n\t\n", "is not YAML: there is a tab in line 3 .*spaces"),
        ("nccl:\t@x", "is not YAML: found character that cannot start any token, line 1"),
        (b"\x00\xffbinary\x00", "is not YAML"),
        (b"\x1b[31mred: 1", "is not YAML"),
        ('"\\e[31mred": 1', r"unknown setting `\\x1b\[31mred`"),
        ("[" * 100_000, "larger or deeper"),
        ("#" * 2_000_000, "larger or deeper"),
        ("prefix: !!python/object/apply:os.system [id]", "is not YAML: could not determine a constructor"),
        ("prefix: 2020-13-45", "is not YAML: month must be in 1..12"),
        ("prefix: !!bool x", "is not YAML: a value does not fit its tag"),
        ("prefix: !!timestamp x", "is not YAML: a value does not fit its tag"),
        ("prefix: 0x" + "f" * 6000, "`prefix` must be text, not such a int"),
        ("nccl: {jobs: 0x" + "f" * 6000 + "}", "`nccl.jobs` must be a number from 0 to 1024"),
    ],
)
def test_config_invalid_is_refused(tmp_path: Path, content: bytes | str, words: str) -> None:
    path = config_of(tmp_path, content)
    error = refused(tmp_path, "settings", "show", "--config", path)
    assert re.search(words, error["message"] + " " + error["hint"]), error
    assert error["code"] == "config"


def test_config_that_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.yaml", tmp_path / "config.yaml" / "below", tmp_path / ("x" * 5000)):
        assert refused(tmp_path, "settings", "show", "--config", path)["hint"]


PREFIXES = [
    "/opt/a b",
    "/opt/'a'",
    '/opt/"a"',
    "/opt/$(id)",
    "/opt/`id`",
    "/opt/$HOME",
    "/opt/a\nb",
    "/opt/a\n",
    "/opt/a:b",
    "/opt/\x1b[31m",
    "opt/a",
    "../a",
    "/opt/../a",
    "/",
    "/.",
    "//",
    "/opt//a",
    "/opt/./a",
    "/opt/a/",
    "/opt/ä",
    "/" + "a" * 3000,
    "~",
    "",
]


@pytest.mark.parametrize("prefix", PREFIXES, ids=ascii)
def test_prefix_invalid_is_refused(tmp_path: Path, prefix: str) -> None:
    error = refused(tmp_path, "settings", "show", "--root", tmp_path / "node", "--set", f"prefix={prefix}")
    assert re.search("`prefix` must|prefix is not YAML", error["message"])


def test_prefix_invalid_stops_every_verb(tmp_path: Path) -> None:
    for verb in VERBS:
        refused(tmp_path, *verb, "--root", tmp_path / "node", "--config", config_of(tmp_path, "prefix: '/a $(id)'"))


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("prefix", "KEY=VALUE"),
        ("=x", "unknown setting"),
        ("nccl=wheel", "unknown setting `nccl`"),
        ("nccl.mod=wheel", "^--set: unknown setting `nccl.mod` did you mean `nccl.mode`"),
        ("nccl.mode=wheels", "^--set: `nccl.mode` must be one of source, wheel, not 'wheels' did you mean `wheel`"),
        ("fp8.fallback=maybe", "must be one of auto, on, off, not 'maybe' $"),
        ("nccl.jobs=[", "not YAML"),
        ("nccl.jobs=2020-13-45", "not YAML"),
        ("nccl.jobs=" + "9" * 5000, "not YAML"),
        ("nccl.jobs=0x" + "f" * 5000, "must be a number from 0 to 1024"),
        ("nccl.jobs=" + "[" * 5000, "larger or deeper"),
    ],
    ids=lambda value: value[:20],
)
def test_assignment_invalid_is_refused(tmp_path: Path, assignment: str, words: str) -> None:
    error = refused(tmp_path, "settings", "show", "--set", assignment)
    assert re.search(words, f"{error['message']} {error['hint']}"), error


# --- stacks, roots, names


@pytest.mark.parametrize(
    ("stack", "words"),
    [("0.18.2", "did you mean `0.18.1`"), ("nothing-like-it", "There is no stack"), (".", "is a directory")],
)
def test_stack_unknown_is_refused(tmp_path: Path, stack: str, words: str) -> None:
    assert words in refused(tmp_path, "plan", "--root", tmp_path / "node", "--stack", stack)["message"]


@pytest.mark.parametrize("content", [b"", b"\xff", b"name: x", b"[" * 100_000, b"name: [\n"])
def test_stack_file_invalid_is_refused(tmp_path: Path, content: bytes) -> None:
    path = config_of(tmp_path, content)
    assert refused(tmp_path, "plan", "--root", tmp_path / "node", "--stack", path)["code"] == "config"


@pytest.mark.parametrize(
    "args",
    [
        ["HF_TOKEN={}"],
        ["cluster", "status", "u:{}@h"],
        ["cluster", "plan", "https://u:{}@h", "x"],
        ["plan", "--config", "https://u:{}@h/c.yaml"],
        ["plan", "--root", "http://u:{}@h"],
        ["plan", "--stack", "https://u:{}@h/x"],
        ["plan", "--set", 'hub.offline={{"password": "{}"}}'],
        ["plan", "VLLM_API_KEY={}"],
    ],
)
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_secret_in_a_word_that_is_refused_is_not_repeated(args: list[str], more: list[str]) -> None:
    run = sparkinstall(*(each.format("Zq9vTopSecret") for each in args), *more)
    assert run.returncode == USAGE and "Zq9v" not in output_of(run), output_of(run)


def _pipe(lock: Path) -> None:
    lock.unlink()
    os.mkfifo(lock)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda lock: lock.write_bytes(b""), "does not pin vllm"),
        (lambda lock: lock.write_bytes(lock.read_bytes()[:60]), "is not a pin with sha256 hashes"),
        (lambda lock: lock.write_bytes(b"\xff\xfe"), "cannot be read"),
        (lambda lock: lock.unlink(), "does not exist"),
        (lambda lock: (lock.unlink(), lock.mkdir()), "cannot be read (it is a folder)"),
        (lambda lock: (lock.unlink(), lock.symlink_to("/dev/zero")), "larger than"),
        (_pipe, "no end within"),
    ],
)
def test_lock_of_a_stack_that_is_damaged_is_named(
    tmp_path: Path, damage: Callable[[Path], object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(given, "PATIENCE", 0.1)
    stack = tiny_stack(tmp_path)
    damage(lock := tmp_path / "tiny.lock")
    run = in_this_process("plan", "--root", tmp_path / "node", "--stack", stack, "--platform", "x86_64", "--json")
    (error,) = envelope(run)["errors"]
    assert (run.returncode, error["code"]) == (1, "config"), error
    assert str(lock) in error["message"] and words in error["message"], error


def test_root_invalid_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "to-root").symlink_to("/")
    for root, words in (
        (tmp_path / "file", "is not a folder"),
        ("/", "is this machine itself"),
        (tmp_path / "to-root", "is this machine itself"),
        (tmp_path / "none/node", "there is no folder"),
        (tmp_path / "a b", "must be an absolute path of letters"),
        (tmp_path / "a$(id)", "must be an absolute path of letters"),
        (tmp_path / "a\nb", "must not contain a line break"),
    ):
        assert words in refused(tmp_path, "plan", "--root", root)["message"], root


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["plan", "--only", "nccll"], "did you mean `nccl`"),
        (["plan", "--skip", "everything"], "known: "),
        (["run", "fp9"], "did you mean `fp8`"),
        (["all", "--ignore", "dsk"], "did you mean `disk`"),
        (["plan", "--platform", "riscv64"], "it has them for: "),
    ],
)
def test_name_unknown_is_refused_with_a_hint(tmp_path: Path, args: list[str], words: str) -> None:
    assert words in refused(tmp_path, *args, "--root", tmp_path / "node")["hint"]


@pytest.mark.parametrize("option", [["--full"], ["--partial"], ["--platform", "aarch64"]])
def test_rehearsal_option_without_a_root_is_refused(tmp_path: Path, option: list[str]) -> None:
    error = refused(tmp_path, "plan", *option)
    assert "for a rehearsal" in error["message"] and "--root" in error["hint"]


def test_all_on_a_machine_that_is_no_spark_changes_nothing(tmp_path: Path) -> None:
    error = refused(tmp_path, "all", code=PREFLIGHT)
    assert "nothing was changed" in error["message"] and "--root ./node" in error["hint"]
    assert not Path("/var/lib/sparkinstall").exists()


def test_all_without_a_terminal_and_yes_changes_nothing(tmp_path: Path) -> None:
    # Every check is ignored: only the prompt, which needs a terminal, can stop it.
    names = [probe["name"] for probe in envelope(in_this_process("plan", "--json"))["data"]["preflight"]]
    ignoring = [word for name in names for word in ("--ignore", name)]
    error = refused(tmp_path, "all", *ignoring)
    assert "no terminal" in error["message"] and "--yes" in error["hint"]
    assert not Path("/var/lib/sparkinstall").exists() and not Path("/opt/sparkinstall").exists()


def test_in_this_process_prints_the_same_as_a_new_process() -> None:
    args = ("settings", "show", "--set", "nccl.mod=wheel", "--json")
    new, this = sparkinstall(*args), in_this_process(*args)
    assert (new.returncode, new.stdout, new.stderr) == (this.returncode, this.stdout, this.stderr)


@pytest.mark.parametrize("args", [["plan", "--nonsense"], ["nonsense"], ["run"], ["plan", "--root"], []])
def test_command_line_invalid_exits_2_without_a_traceback(args: list[str]) -> None:
    run = in_this_process(*args)
    assert run.returncode == USAGE and "Traceback" not in output_of(run)


@pytest.mark.network
def test_nccl_arch_unknown_to_nvcc_is_refused(tmp_path: Path) -> None:
    """Only the preflight of a node calls nvcc, so this runs the node's check with the real compiler."""
    home = toolkit()
    run = sparkinstall("plan", "--json", "--set", "nccl.arch=99", "--set", f"nccl.cuda_home={home}")
    found = {probe["name"]: probe for probe in envelope(run)["data"]["preflight"]}["cuda"]
    assert found["verdict"] == "fail" and "does not support compute_99" in found["found"]
    assert "121" in found["hint"]
    error = refused(tmp_path, "plan", "--set", "nccl.arch=blackwell")
    assert "must be an architecture number such as 121" in error["message"]


# --- JSON


@pytest.mark.parametrize("verb", [*VERBS, ["uninstall"]], ids=" ".join)
def test_json_of_a_usage_error_is_one_envelope(tmp_path: Path, verb: list[str]) -> None:
    (tmp_path / "file").write_bytes(b"")
    answer = envelope(in_this_process(*verb, "--root", tmp_path / "file", "--json"))
    assert answer["command"] == " ".join(verb).removesuffix(" env-files")
    assert (answer["version"], answer["status"], answer["exit_code"]) == (1, "usage", USAGE)
    assert set(answer["errors"][0]) == {"code", "message", "cause", "hint", "log", "output"}


# --- the machine's own files

SERIAL = "1834925000123"
HOSTILE = {
    "escapes": f'DGX_PRETTY_NAME="\x1b]0;owned\x07\x9b31m[/bold][red]x"\nDGX_SERIAL_NUMBER="{SERIAL}"\n'.encode(
        "latin-1"
    ),
    "endless": f"DGX_SERIAL_NUMBER={SERIAL}\nDGX_PRETTY_NAME=".encode() + b"A" * 10_000_000,
    "no newline": f"DGX_SERIAL_NUMBER={SERIAL}".encode(),
    "nuls": b"\0" * 1000 + f"\nDGX_SERIAL_NUMBER='{SERIAL}'\0\nDGX_PRETTY_NAME=\0x\0\n".encode(),
    "not text": bytes(range(256)) * 10 + f"\nexport DGX_SERIAL_NUMBER={SERIAL}\r\n".encode(),
    "odd ends": f"A=1\x0bDGX_SERIAL_NUMBER={SERIAL}\x0cB=2\x1eDGX_SERIAL_NUMBER={SERIAL}\x85".encode(),
}
# Only this process and its children see the overlay; it ends with them.
WITH_ETC = 'mount -t overlay overlay -o "lowerdir=$0:/etc" /etc && exec "$@"'


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_release_file_hostile_is_read_and_its_serial_number_is_not_shown(tmp_path: Path, content: bytes) -> None:
    need_root()
    etc = tmp_path / "etc"
    etc.mkdir()
    (etc / "dgx-release").write_bytes(content)
    # No test without a root passes --yes: it would set up a real Spark.
    for args in (["all", "--json"], ["plan", "-v"]):
        run = subprocess.run(
            ["unshare", "--mount", "sh", "-c", WITH_ETC, etc, sys.executable, "-m", "sparkinstall", *args],
            cwd=CHECKOUT,
            env=environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=300,
        )
        assert run.returncode == (PREFLIGHT if args[0] == "all" else 0), output_of(run)
        assert SERIAL not in output_of(run) and "Traceback" not in output_of(run)
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f]", output_of(run))
        assert len(output_of(run)) < 50_000
    assert not Path("/var/lib/sparkinstall").exists()


def test_rehearsal_writes_no_serial_number(tmp_path: Path) -> None:
    root, stack = tmp_path / "node", tiny_stack(tmp_path / "stack")
    (root / "etc").mkdir(parents=True)
    (root / "etc/dgx-release").write_bytes(HOSTILE["no newline"])
    run = Rehearsal(root, (*SETTINGS, "--stack", str(stack))).all("--json", **no_index(stack))
    assert SERIAL not in output_of(run)
    written = [path for path in (root / "var").rglob("*") if path.is_file()]
    assert {"journal.jsonl", "environment.log"} <= {path.name for path in written}, output_of(run)
    for path in written:
        assert SERIAL not in path.read_text()


@pytest.mark.parametrize(
    "verb",
    [
        ["all"],
        ["all", "--json"],
        ["plan"],
        ["plan", "--json"],
        ["verify"],
        ["settings", "show"],
        ["settings", "show", "--json"],
    ],
    ids=" ".join,
)
def test_secret_in_the_environment_is_not_printed(tmp_path: Path, verb: list[str]) -> None:
    secret = "plain-secret-words"
    source = f"nccl.source=https://user:{secret}@127.0.0.1:1/nccl.tar.gz"
    only = ("--only", "nccl") if verb[0] in ("all", "plan", "verify") else ()
    run = sparkinstall(*verb, "--root", tmp_path / "node", "--set", source, *only, HF_TOKEN=secret)
    assert secret not in output_of(run), output_of(run)


# --- the user's environment


def test_plan_with_a_missing_home_and_an_unknown_locale_succeeds(tmp_path: Path) -> None:
    run = sparkinstall("plan", "--root", tmp_path / "node", "--json", HOME="/nonexistent", LC_ALL="xx_YY", TERM="dumb")
    assert envelope(run)["exit_code"] == 0
    assert not (tmp_path / "node").exists()
