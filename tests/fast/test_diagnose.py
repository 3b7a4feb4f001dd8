"""`diagnose` as a command: what it prints, and how it reads files, followed logs and the journal."""

import contextlib
import gzip
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from sparkinstall.diagnose import sources
from tests.support import forks
from tests.support.diagnosing import KNOWN, REPOSITORY, causes, diagnosed, example
from tests.support.rehearsals import TIMEOUT_SECONDS, environment
from tests.support.waiting import until


def run(*argv: str, given: bytes = b"") -> "subprocess.CompletedProcess[str]":
    return forks.run("sparkinstall", argv, environment(COLUMNS="100"), TIMEOUT_SECONDS, stdin=given)


def test_diagnose_prints_causes_and_consequences(tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_bytes(b"ok\n" + example("nccl-versions-differ") + example("engine-dead") * 2)
    ended = run("diagnose", str(log))
    assert ended.returncode == 3
    words = ended.stdout.split("Consequences")
    for expected in (
        "nccl-versions-differ",
        "2 │",
        "why",
        "fix 1",
        "https://github.com/NVIDIA/nccl/issues/1176",
    ):
        assert expected in words[0]
    assert "engine-dead, line 3, 2 lines" in words[1]
    assert ended.stderr == ""


def test_diagnose_prints_what_is_known_first_where_nothing_tells_the_cause() -> None:
    ended = run("diagnose", given=example("worker-died") + example("engine-dead"))
    assert ended.returncode == 3
    first, others = ended.stdout.split("Consequences")
    assert first.startswith("The cause is in no line of this log")
    assert first.index("a worker process has died") < first.index("journalctl -k -b")
    assert "engine-dead" not in first
    assert "engine-dead, line 2" in others
    assert "cause not known, 2 consequences" in others


def test_diagnose_failure_that_is_not_known_says_so_and_exits_3(tmp_path: Path) -> None:
    log = tmp_path / "own.log"
    log.write_text("Error: own rows are gone, run `apt install own-rows`\n")
    ended = run("diagnose", str(log))
    assert ended.returncode == 3
    for words in ("The cause is not known", "own rows are gone", "`apt install own-rows`", "cause not known; see also"):
        assert words in ended.stdout


def test_consequence_alone_is_shown_with_the_most_suspicious_line() -> None:
    log = b"""(EngineCore pid=700) ERROR 10-02 09:00:01 [core.py:1330] EngineCore failed to start.
(EngineCore pid=700) ERROR 10-02 09:00:01 [core.py:1330] RuntimeError: the widget table of layer 7 is not aligned
(APIServer pid=650) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""
    found = diagnosed(log)
    assert not found.causes
    assert [each.line for each in found.telling] == [2]
    ended = run("diagnose", given=log)
    assert ended.returncode == 3
    assert "The cause is not known" in ended.stdout and "the widget table of layer 7" in ended.stdout
    assert "1 cause" not in ended.stdout


def test_diagnose_prints_the_place_and_the_other_suspicious_lines_of_a_general_cause(tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_text(
        'Traceback (most recent call last):\n  File "/e/site-packages/own/a.py", line 7, in run\n    go()\n'
        "TypeError: go() got an unexpected keyword argument 'x'\nerror: the rest was left out\n"
    )
    ended = run("diagnose", str(log))
    words = " ".join(ended.stdout.split())
    assert ended.returncode == 3
    assert "in own/a.py, run" in words
    assert "Other suspicious lines: 5 │ error: the rest was left out" in words


def test_shown_line_has_no_host_secret_or_control_character(tmp_path: Path) -> None:
    token = "hf_" + "a" * 30
    log = tmp_path / "x.log"
    log.write_text(
        f"Nov 21 16:00:00 spark-3995 vllm[7]: \x1b]0;title\x07\x1b[2JOSError: No space left on device {token}\n"
        "spark-3995:4121:4190 [0] bootstrap.cc:251 NCCL WARN Message truncated : received 176 bytes instead of 172\n"
    )
    ended = run("diagnose", str(log))
    assert ended.returncode == 3
    assert "spark-3995" not in ended.stdout
    assert token not in ended.stdout
    assert "\x1b" not in ended.stdout
    assert "Nov 21 16:00:00 vllm[7]: OSError" in ended.stdout


@pytest.mark.parametrize("packed", [False, True])
def test_diagnose_json_is_one_envelope(packed: bool, tmp_path: Path) -> None:
    log, data = tmp_path / "vllm.log", example("engine-dead") + example("oom-killer")
    log.write_bytes(gzip.compress(data) if packed else data)
    ended = run("diagnose", str(log), "--json")
    answer = json.loads(ended.stdout)
    assert (ended.returncode, answer["exit_code"], answer["status"], answer["errors"]) == (3, 3, "drift", [])
    first, second = answer["data"]["found"]
    assert (first["name"], first["severity"], first["explained_by"]) == ("oom-killer", "failure", [])
    assert first["lines"][0]["line"] == 2
    assert (second["name"], second["explained_by"]) == ("engine-dead", ["oom-killer"])
    assert answer["data"]["logs"] == [{"name": str(log), "bytes": len(data), "lines": 2}]


def test_diagnose_good_log_or_warning_exits_0() -> None:
    assert run("diagnose", "-", given=b"all good\n").returncode == 0
    ended = run("diagnose", given=example("driver-no-memory"))
    assert ended.returncode == 0
    assert "driver-no-memory" in ended.stdout


def test_diagnose_judges_several_logs_together(tmp_path: Path) -> None:
    (tmp_path / "head.log").write_bytes(example("engine-dead"))
    (tmp_path / "worker.log").write_bytes(example("ray-memory-monitor"))
    ended = run("diagnose", str(tmp_path / "head.log"), str(tmp_path / "worker.log"))
    assert ended.returncode == 3
    assert f"{tmp_path}/worker.log\n" in ended.stdout.split("Consequences")[0]
    assert f"{tmp_path}/head.log:1" in ended.stdout.split("Consequences")[1]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("/no/such/file",), "no such file"),
        (("/",), "is a folder"),
        (("-", "-"), "stdin can be read only once"),
        (("-", "/dev/null", "--follow"), "only one log can be followed"),
        (("/dev/null", "--boot"), "--boot needs a unit"),
    ],
)
def test_diagnose_unreadable_log_exits_2(argv: Sequence[str], words: str) -> None:
    ended = run("diagnose", *argv, "--json")
    assert ended.returncode == 2
    assert words in json.loads(ended.stdout)["errors"][0]["message"]


def test_diagnose_damaged_archive_exits_2(tmp_path: Path) -> None:
    (tmp_path / "x.gz").write_bytes(gzip.compress(os.urandom(5000))[:3000])
    ended = run("diagnose", str(tmp_path / "x.gz"))
    assert ended.returncode == 2
    assert "is damaged" in ended.stderr


def test_diagnose_known_lists_every_signature() -> None:
    ended = run("diagnose", "--known", "--json")
    assert [each["name"] for each in json.loads(ended.stdout)["data"]["known"]] == [each.name for each in KNOWN]


# --- following


class Followed:
    """A running `diagnose --follow`, and its output so far."""

    def __init__(self, *argv: str) -> None:
        environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sparkinstall", "diagnose", "--follow", *argv],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.PIPE, env=environ,
        )  # fmt: skip
        self.output = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self.output += line.decode()

    def until(self, words: str) -> None:
        until(lambda: words in self.output, during=self._process)

    def until_it_reads(self, log: Path) -> None:
        files = Path(f"/proc/{self._process.pid}/fd")

        def has_read() -> bool:
            """Whether it sleeps, and its place in the file, which the kernel tells, is the end."""
            at = [each.name for each in files.iterdir() if os.path.realpath(each) == str(log)]
            try:
                told = [(files.parent / "fdinfo" / each).read_text() for each in at]
            except FileNotFoundError:
                # It has just closed one.
                return False
            state = (files.parent / "stat").read_text().rpartition(")")[2].split()[0]
            return state == "S" and any(int(each.split()[1]) == log.stat().st_size for each in told)

        until(has_read, during=self._process)

    def end(self) -> int:
        self._process.send_signal(signal.SIGINT)
        code = self._process.wait(300)
        self._reader.join(300)
        assert self._process.stderr
        assert b"Traceback" not in self._process.stderr.read()
        for stream in (self._process.stdout, self._process.stderr, self._process.stdin):
            if stream:
                stream.close()
        return code


@contextlib.contextmanager
def following(*argv: str) -> Iterator[Followed]:
    followed = Followed(*argv)
    try:
        yield followed
    finally:
        followed._process.kill()
        followed._process.wait()


def test_follow_shows_each_failure_until_ctrl_c(tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_bytes(b"starting\n")
    with following(str(log)) as followed:
        with log.open("ab") as out:
            out.write(example("oom-killer"))
        followed.until("oom-killer")
        with log.open("ab") as out:
            out.write(example("engine-dead"))
        followed.until("a consequence of oom-killer")
        assert followed.end() == 3
    assert followed.output.count("the kernel ran out of memory") == 1
    assert "1 cause, 1 consequence" in followed.output


def test_follow_reads_a_rotated_and_a_rewritten_log(tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_bytes(example("disk-full") + b"x" * 1000 + b"\n")
    with following(str(log)) as followed:
        followed.until("disk-full")
        log.rename(tmp_path / "vllm.log.1")
        log.write_bytes(example("oom-killer"))
        followed.until("oom-killer")
        log.write_bytes(example("gpu-fell-off"))
        followed.until("gpu-fell-off")
        assert followed.end() == 3


def test_follow_without_a_failure_exits_0(tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_bytes(b"all good\n")
    with following(str(log), "--json") as followed:
        followed.until_it_reads(log)
        assert followed.end() == 0
    assert json.loads(followed.output)["data"]["logs"][0]["lines"] == 1


# --- the journal


STARTING, STARTED = "7d4958e842da4a758f6c1cdc7b36dcc5", "39f53479d3a045ac8e11786248231fbf"
AGAIN = "5eb03494b6584870a536b337290809b3"
JOURNALCTL = """#!/bin/sh
# Prints its arguments and the last entry of a unit that died; for --output=json, the marks in the file beside it.
case "$*" in *--output=json*) cat "$0.err" >&2; exec cat "$0.marks" ;; esac
echo "2026-11-21T16:00:00+0000 spark-1 asked[1]: $*"
echo "2026-11-21T16:00:01+0000 spark-1 systemd[1]: vllm.service: Failed with result 'oom-kill'."
"""


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in {"journalctl": JOURNALCTL, "systemctl": "#!/bin/sh\necho not-found\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "journalctl.marks").write_text("-- No entries --\n")
    (tmp_path / "journalctl.err").write_text("")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def test_unit_unknown_exits_2(journal: Path) -> None:
    ended = run("diagnose", "--unit", "vlm")
    assert ended.returncode == 2
    assert "no such unit: vlm.service" in ended.stderr
    del journal


def test_serve_logs_without_a_service_says_how_to_make_one(journal: Path) -> None:
    ended = run("serve", "logs")
    assert ended.returncode == 2
    assert "there is no service vllm" in ended.stderr and "`journalctl -u vllm`" in ended.stderr
    del journal


def test_unit_without_entries_is_an_error(journal: Path) -> None:
    (journal / "systemctl").write_text("#!/bin/sh\nexit 1\n")
    (journal / "journalctl").write_text("#!/bin/sh\nexit 0\n")
    ended = run("diagnose", "--unit", "vlm")
    assert ended.returncode == 1
    assert "the journal has no entries of unit `vlm`" in ended.stderr
    assert "`systemctl list-units --all`" in ended.stderr and "group adm" in ended.stderr
    log = journal / "x.log"
    log.write_text("INFO all good\n")
    (error,) = json.loads(run("diagnose", str(log), "--unit", "vlm", "--json").stdout)["errors"]
    assert error["message"] == "the journal has no entries of unit `vlm`"
    log.write_bytes(example("triton-missing"))
    assert run("diagnose", str(log), "--unit", "vlm").returncode == 3


def test_unit_log_has_entries_of_systemd_and_the_kernel(journal: Path) -> None:
    data = unit_log_with(journal)
    assert b"_SYSTEMD_UNIT=vllm.service + UNIT=vllm.service + _TRANSPORT=kernel" in data
    assert causes(diagnosed(data)) == ["unit-out-of-memory"]


def unit_log_with(journal: Path, marks: Sequence[tuple[str, int]] = (), boot: bool = False) -> bytes:
    """The log of a unit for which systemd has recorded these starts."""
    (journal / "systemctl").write_text("#!/bin/sh\necho loaded\n")
    entries = [{"MESSAGE_ID": mark, "__REALTIME_TIMESTAMP": str(at), "__CURSOR": "s=1"} for mark, at in marks]
    if entries:
        (journal / "journalctl.marks").write_text("".join(f"{json.dumps(each)}\n" for each in entries))
    return b"".join(sources.unit_log("vllm", boot=boot).pieces())


def test_unit_log_begins_at_the_last_start(journal: Path) -> None:
    starts = [(STARTING, 5_000_000), (STARTED, 5_500_000), (STARTING, 1700000000_000042), (STARTED, 1700000000_900000)]
    assert b"--boot --output=short-iso --since=@1700000000.000042 _SYSTEMD_UNIT" in unit_log_with(journal, starts)
    assert b"--since" not in unit_log_with(journal, starts, boot=True)
    (journal / "journalctl.marks").write_text("")
    assert b"--since" not in unit_log_with(journal)


@pytest.mark.parametrize(
    ("marks", "begins"),
    [
        pytest.param([], None, id="none noted"),
        pytest.param([(AGAIN, 9)], None, id="the start itself is no longer there"),
        pytest.param([(STARTED, 1)], 1, id="a simple unit"),
        pytest.param([(STARTING, 1), (STARTED, 2)], 1, id="a unit that says when it is ready"),
        pytest.param([(STARTING, 1)], 1, id="still starting, or failed so"),
        pytest.param([(STARTED, 1), (STARTED, 2), (STARTED, 3)], 3, id="restarted by a person"),
        pytest.param([(STARTED, 1), (AGAIN, 2), (STARTED, 3)], 1, id="started again by systemd"),
        pytest.param([(STARTED, 1), (AGAIN, 2), (STARTED, 3), (AGAIN, 4), (STARTED, 5)], 3, id="a loop"),
        pytest.param([(STARTING, 1), (AGAIN, 2), (STARTING, 3), (AGAIN, 4), (STARTING, 5)], 3, id="a loop of starts"),
        pytest.param([(STARTED, 1), (AGAIN, 2), (STARTED, 3), (STARTED, 4)], 4, id="a loop, then a restart by hand"),
        pytest.param([(STARTING, 1), (STARTED, 2), (AGAIN, 3)], 1, id="about to be started again"),
        pytest.param([(AGAIN, 2), (STARTING, 3), (STARTED, 4)], 3, id="the run before is no longer there"),
    ],
)
def test_start_to_read_from_is_the_last_start_with_its_cause(marks: list[tuple[str, int]], begins: int | None) -> None:
    assert sources.start_to_read_from(marks) == begins


@pytest.mark.parametrize(
    "message",
    [
        "No journal files were opened due to insufficient permissions.\n",
        "Hint: You are currently not seeing messages from other users and the system.\n",
    ],
)
def test_unit_journal_without_permission_is_an_error(message: str, journal: Path) -> None:
    (journal / "systemctl").write_text("#!/bin/sh\necho loaded\n")
    (journal / "journalctl.err").write_text(message)
    ended = run("diagnose", "--unit", "vllm", "--json")
    (error,) = json.loads(ended.stdout)["errors"]
    assert (ended.returncode, error["code"]) == (1, "sudo")
    assert "sudo -v" in error["hint"]
