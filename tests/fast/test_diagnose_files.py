"""`diagnose` reads a log in any encoding, says of a file that it is no log, and needs no more memory for many files."""

import bz2
import gzip
import io
import json
import lzma
import os
import random
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkinstall.diagnose.encodings import text_of
from sparkinstall.diagnose.judge import judge, read
from sparkinstall.diagnose.sources import Log
from tests.support import forks
from tests.support.diagnosing import LINES, LOOKED_FOR
from tests.support.rehearsals import CHECKOUT, TIMEOUT_SECONDS, environment

OOM = LINES["oom-killer"][0]
TEXT = f"INFO 11-21 16:46:08 starting ✓ für 漢字 {'x' * 300}\r\n" * 30 + f"{OOM}\r\nINFO ended\r\n"
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be")
BOMS = {"utf-16-be": b"\xfe\xff", "utf-32-be": b"\x00\x00\xfe\xff"}


def found_in(data: bytes, sizes: Iterator[int] | None = None) -> tuple[list[str], int]:
    """The failures in a log that arrives in pieces of these sizes, and its number of lines."""

    def pieces() -> Iterator[bytes]:
        stream = io.BytesIO(data)
        while piece := stream.read(next(sizes) if sizes else 1 << 20):
            yield piece

    search = read(Log("x", lambda: text_of("x", pieces())), LOOKED_FOR)
    return [each.name for each in judge([search]).found], search.lines


def run(*argv: str, given: bytes = b"") -> "subprocess.CompletedProcess[str]":
    return forks.run("sparkinstall", ("diagnose", *argv), environment(COLUMNS="100"), TIMEOUT_SECONDS, stdin=given)


# --- encodings


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("bom", [False, True])
def test_failure_is_found_in_every_encoding(encoding: str, bom: bool) -> None:
    data = (BOMS.get(encoding, b"") if bom else b"") + TEXT.encode(encoding)
    assert found_in(data) == (["oom-killer"], 32)


@given(st.sampled_from(ENCODINGS), st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_encoding_does_not_depend_on_how_the_log_arrives(encoding: str, sizes: list[int]) -> None:
    text = f"INFO starting\n{OOM}\nINFO ended\n"
    assert found_in(text.encode(encoding), cycle(sizes)) == (["oom-killer"], 3)


@pytest.mark.parametrize("first", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("then", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le"])
def test_text_appended_in_another_encoding_is_read(first: str, then: str) -> None:
    assert "oom-killer" in found_in("INFO starting\n".encode(first) + f"{OOM}\n".encode(then))[0]


@pytest.mark.parametrize("holes", [(0, 5000), (5000, 0), (3 << 20, 0), (1, 1), (4096, 4096)])
def test_log_with_a_hole_of_nul_bytes_is_read(holes: tuple[int, int]) -> None:
    before, after = (b"\0" * each for each in holes)
    assert found_in(before + TEXT.encode() + after + f"{OOM}\n".encode())[0] == ["oom-killer"]


@pytest.mark.parametrize("encoding", ["latin-1", "cp1251", "shift-jis", "gb18030"])
def test_log_in_a_national_encoding_is_read(encoding: str) -> None:
    line = {"latin-1": "für", "cp1251": "Ошибка сети", "shift-jis": "エラー", "gb18030": "错误"}[encoding]
    assert found_in(f"{line} 12:00:01 [worker] /var/log\n{OOM}\n".encode(encoding))[0] == ["oom-killer"]


def test_terminal_recording_is_read() -> None:
    line = "\x1b[2K\rLoading 10%\x08\x08\x1b(B\x0f\x1b[0m\n"
    assert found_in((line * 40 + OOM).encode())[0] == ["oom-killer"]


# --- packed and foreign files


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress], ids=["gzip", "bzip2", "xz"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_packed_log_is_read_from_a_file_and_from_stdin(
    pack: Callable[[bytes], bytes], encoding: str, tmp_path: Path
) -> None:
    data = pack(TEXT.encode(encoding)) + pack(f"{OOM}\n".encode(encoding))
    (tmp_path / "log").write_bytes(data)
    for ended in (run(str(tmp_path / "log"), "--json"), run("-", "--json", given=data)):
        assert ended.returncode == 3, ended.stderr
        assert json.loads(ended.stdout)["data"]["found"][0]["count"] == 2


def _zip() -> bytes:
    with zipfile.ZipFile(made := io.BytesIO(), "w") as archive:
        archive.writestr("vllm.log", TEXT)
    return made.getvalue()


def _packed_tar() -> bytes:
    with tarfile.open(fileobj=(made := io.BytesIO()), mode="w:gz") as archive:
        (entry := tarfile.TarInfo("core")).size = 1 << 16
        archive.addfile(entry, io.BytesIO(random.Random(1).randbytes(1 << 16)))
    return made.getvalue()


FOREIGN = {
    "random": random.Random(7).randbytes(100_000),
    "a few bytes": b"\x01\x02\x03",
    "zstd": b"\x28\xb5\x2f\xfd" + random.Random(2).randbytes(50),
    "lz4": b"\x04\x22\x4d\x18" + random.Random(3).randbytes(50),
    "zip": _zip(),
    "a journal": b"LPKSHHRH" + bytes(500) + TEXT.encode(),
    "a program": Path(sys.executable).read_bytes()[: 1 << 20],
    "a picture": b"\x89PNG\r\n\x1a\n" + random.Random(4).randbytes(5000),
    "packed twice": gzip.compress(gzip.compress(TEXT.encode())),
    "NUL bytes": bytes(100_000),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_file_that_is_no_text_is_named_and_not_called_healthy(name: str, tmp_path: Path) -> None:
    (tmp_path / "some log").write_bytes(FOREIGN[name])
    for ended in (run(str(tmp_path / "some log")), run("-", given=FOREIGN[name])):
        assert ended.returncode == 2
        said = " ".join(ended.stderr.split())
        assert "not text" in said and "do " in said
        assert "no known failure" not in ended.stdout


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress], ids=["gzip", "bzip2", "xz"])
@pytest.mark.parametrize("how", ["cut", "changed", "followed by others"])
def test_damaged_archive_is_an_error(pack: Callable[[bytes], bytes], how: str, tmp_path: Path) -> None:
    data = bytearray(pack(random.Random(5).randbytes(4000).hex().encode() + b"\n"))
    if how == "cut":
        data = data[: len(data) // 2]
    elif how == "changed":
        data[len(data) // 2 : len(data) // 2 + 200] = bytes(200)
    else:
        data += b"\xff" * 50
    (tmp_path / "log").write_bytes(data)
    ended = run(str(tmp_path / "log"))
    if how != "followed by others" or ended.returncode:  # gzip and bz2 ignore what follows
        assert ended.returncode == 2 and "is damaged" in ended.stderr


def test_empty_log_is_called_empty(tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    ended = run(str(tmp_path / "log"))
    assert ended.returncode == 0 and "the log is empty" in ended.stdout


# --- memory


def _peak(*argv: str) -> float:
    """The largest memory of a run in MiB."""
    script = (
        "import sys; from sparkinstall.cli.app import main\n"
        "sys.argv[0] = 'sparkinstall'\n"
        "try: main()\nexcept SystemExit: pass\n"
        # Not ru_maxrss, which begins with the memory of this process.
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0], file=sys.stderr)"
    )
    environ = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    ended = subprocess.run([sys.executable, "-c", script, "diagnose", *argv], capture_output=True, env=environ)
    return int(ended.stderr.split()[-1]) / 1024


@pytest.mark.parametrize(
    "line", ["INFO all good", OOM, "RuntimeError: something else {}"], ids=["good", "failed", "suspicious"]
)
def test_memory_does_not_grow_with_the_number_of_files(line: str, tmp_path: Path) -> None:
    log = tmp_path / "small.log"
    words = ["".join(random.Random(at).choices("abcdefghij", k=200)) for at in range(120)]
    log.write_text("".join(f"{line.format(word)}\n" for word in words))
    assert _peak(*[str(log)] * 200) < _peak(str(log)) + 3


def test_many_logs_are_judged_as_one_case() -> None:
    logs = [Log(str(at), partial(iter, [f"RuntimeError: {chr(97 + at)}\n".encode()])) for at in range(20)]
    found = judge(read(each, LOOKED_FOR) for each in logs)
    assert [each.log for each in found.telling] == [str(at) for at in range(20)]
    assert [each.lines for each in found.logs] == [1] * 20
