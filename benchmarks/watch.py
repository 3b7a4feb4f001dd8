"""The CPU time that `sparkinstall watch` uses, and what its scrapes cost the server.

    python -m benchmarks.watch URL      of a vLLM on this machine; writes watch.md

The view is drawn on a terminal of 120 columns. One client keeps the server busy in the second round. The time of the
server is that of its API process, which answers the scrapes, by its own process_cpu_seconds_total.
"""

import datetime
import fcntl
import os
import platform
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.report import table
from sparkinstall.measure.metrics_text import told
from tests.support.streamed_load import streamed

RESULTS = Path(__file__).with_name("watch.md")
REPOSITORY = Path(__file__).parents[1]
SECONDS, WARM_UP, COLUMNS = 60.0, 8.0, 120
_SERVER = re.compile(r"^process_cpu_seconds_total (\S+)", re.MULTILINE)


def main(url: str) -> None:
    """Measure, and write watch.md."""
    rows = [_round("idle", url)]
    with _busy(url):
        rows.append(_round("one request after the other", url))
    made = f"{datetime.date.today()}, {os.cpu_count()} cores, {platform.machine()}, vLLM on the CPU"
    title = f"`sparkinstall watch`, a sample every 2 seconds, over {SECONDS:.0f} seconds"
    head = ("the server", "the view, of one core", "the server without a view", "the server with a view")
    text = ["# Watching", "", f"Made by `python -m benchmarks.watch URL` on {made}.", "", table(title, head, rows)]
    RESULTS.write_text("\n".join(text))
    print(RESULTS.read_text())


def _round(name: str, url: str) -> tuple[str, ...]:
    alone = _share(lambda: _of_server(url))
    with viewed("--url", url) as pid:
        time.sleep(WARM_UP)
        before = _of_server(url)
        view = _share(lambda: of_process(pid))
        beside = (_of_server(url) - before) / SECONDS
    return name, *(f"{share:.2%}" for share in (view, alone, beside))


def _share(read: Callable[[], float]) -> float:
    """The share of one core that is used for a minute."""
    before, began = read(), time.monotonic()
    time.sleep(SECONDS)
    return (read() - before) / (time.monotonic() - began)


def of_process(pid: int) -> float:
    """Seconds of a process and of the programs that it has run and waited for."""
    fields = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _of_server(url: str) -> float:
    found = _SERVER.search(_metrics(url))
    if not found:
        raise RuntimeError(f"{url}/metrics has no process_cpu_seconds_total")
    return float(found[1])


def _metrics(url: str) -> str:
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        return str(answer.read().decode())


@contextmanager
def viewed(*options: str) -> Iterator[int]:
    """Run the verb on a terminal that is read all the time; its pid."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    argv = [sys.executable, "-m", "sparkinstall", "watch", *options]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(REPOSITORY), *sys.path[1:])), "TERM": "xterm-256color"}
    with subprocess.Popen(argv, env=env, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        threading.Thread(target=_drain, args=(ours,), daemon=True).start()
        yield process.pid
        process.terminate()


def _drain(terminal: int) -> None:
    try:
        while os.read(terminal, 65536):
            pass
    except OSError:  # the view has ended
        pass


@contextmanager
def _busy(url: str) -> Iterator[None]:
    """Send requests to the first served model, one after the other."""
    (model, *_), ended = told(_metrics(url)).models, threading.Event()

    def send() -> None:
        number = 0
        while not ended.is_set():
            number += 1
            list(streamed(url, model, 64, number))

    worker = threading.Thread(target=send, daemon=True)
    worker.start()
    yield
    ended.set()
    worker.join()


if __name__ == "__main__":
    main(sys.argv[1])
