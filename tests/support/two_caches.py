"""A head and a worker, each a cache and a prefix, that copy artifacts with real processes and sockets.

They are at 127.0.0.1 and 127.0.0.2, addresses of this machine. A config may not name these, so `main` sets them for
`node offer` and `node fetch` after the config was read.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec.structs import replace

REPOSITORY = Path(__file__).resolve().parents[2]
HEAD, WORKER, OTHER = "127.0.0.1", "127.0.0.2", "127.0.0.3"
TOKEN = "a-token-of-these-tests"


@dataclass(frozen=True)
class Side:
    """A node whose files are all below `home`."""

    home: Path
    address: str
    settings: tuple[str, ...] = ()

    @property
    def cache(self) -> Path:
        return self.home / "cache/sparkinstall"

    @property
    def prefix(self) -> Path:
        return self.home / "opt"

    @property
    def environment(self) -> dict[str, str]:
        own = {"HOME": str(self.home), "XDG_CACHE_HOME": str(self.home / "cache"), "PYTHONPATH": str(REPOSITORY)}
        return {**os.environ, **own}

    def start(self, *argv: str) -> "subprocess.Popen[str]":
        words = [word for each in (f"prefix={self.prefix}", *self.settings) for word in ("--set", each)]
        whole = [sys.executable, "-m", "tests.support.two_caches", self.address, "node", *argv, *words, "--json"]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            whole, env=self.environment, cwd=self.home, stdin=pipe, stdout=pipe, stderr=pipe, text=True
        )


@dataclass
class Offered:
    """A running offer, with what the head announced."""

    process: "subprocess.Popen[str]"
    port: int = 0
    fingerprint: str = ""

    def as_given(self, **other: Any) -> str:
        return json.dumps({"token": TOKEN, "port": self.port, "fingerprint": self.fingerprint, **other}) + "\n"


@contextmanager
def offering(head: Side, *only: str, workers: int = 1) -> Iterator[Offered]:
    """An offer of the head for these steps, which ends with the context at the latest."""
    with head.start("offer", str(workers), *(word for each in only for word in ("--only", each))) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(TOKEN + "\n")
        process.stdin.flush()
        offered = Offered(process)
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith('{"port"'):
                offered.port, offered.fingerprint = json.loads(line).values()
                break
        else:
            raise AssertionError("".join(lines) + (process.stdout.read() if process.stdout else ""))
        try:
            yield offered
        finally:
            process.terminate()


def ended(offered: Offered) -> Mapping[str, Any]:
    """The reply of an offer that served every peer."""
    out, err = offered.process.communicate(timeout=60)
    assert offered.process.returncode == 0, out + err
    return dict(json.loads(out)["data"])


def fetched(worker: Side, offered: Offered, *only: str, **other: Any) -> tuple[int, dict[str, Any], str]:
    """Run a fetch: exit code, data, first error."""
    with worker.start("fetch", *(word for each in only for word in ("--only", each))) as process:
        out, err = process.communicate(offered.as_given(**other), timeout=60)
    reply = json.loads(out)
    errors = [f"{each['message']} {each['cause']}" for each in reply["errors"]]
    assert "Traceback" not in err, err
    return reply["exit_code"], reply["data"], errors[0] if errors else ""


def main() -> None:
    """Run a verb as the node whose address is the first argument."""
    from sparkinstall.cli import app
    from sparkinstall.config import ClusterConfig
    from sparkinstall.core import session

    address = sys.argv.pop(1)
    workers = (WORKER, OTHER)
    cluster = ClusterConfig(role="head" if address == HEAD else "worker", head=HEAD, workers=workers, address=address)
    opened = session.open_session

    def open_session(target: session.Target) -> session.Session:
        found = opened(target)
        config = replace(found.node.config, cluster=cluster)
        return replace(found, node=replace(found.node, config=config))

    session.open_session = open_session
    app.main()


if __name__ == "__main__":
    main()
