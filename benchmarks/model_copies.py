"""Models: `models pull` beside the hub's own client, `models sync` beside rsync.

    python -m benchmarks.model_copies [GIGABYTES]      as root, with rsync; writes model_copies.md

The hub is a server on this machine. The nodes are two network namespaces with a cable between them.
"""

import datetime
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from benchmarks.cable import (
    HEAD,
    HEAD_SPACE,
    SSH_PORT,
    WORKER,
    WORKER_SPACE,
    Copied,
    cable,
    copied_table,
    machine,
    measured,
    sshd,
)
from sparkinstall.assets import user_cache
from sparkinstall.cluster import bootstrap
from tests.lab.commands import run
from tests.support import hub_client
from tests.support.far_nodes import FarNodes
from tests.support.model_hub import ModelHub, served
from tests.support.rehearsals import CHECKOUT
from tests.support.stored_models import FOLDER, MODEL, store

RESULTS = Path(__file__).with_name("model_copies.md")
ROUNDS, SHARDS = 3, 4
PULLED, SYNCED = 2_000_000_000, 8
"""Bytes of the model that is pulled, which the hub has in memory, and GB of the one that is copied to a node."""
CIPHERS = {"rsync": (), "rsync, aes128-gcm@openssh.com": ("-c", "aes128-gcm@openssh.com")}
_HF = "from huggingface_hub.cli.hf import main; main()"

Ways = Mapping[str, Callable[[], None]]


def main() -> None:
    """Measure, and write model_copies.md."""
    if not shutil.which("rsync"):
        sys.exit("rsync is missing: sudo apt-get install rsync")
    size = int(float(sys.argv[1] if sys.argv[1:] else SYNCED) * 1e9)
    with tempfile.TemporaryDirectory(dir=user_cache()) as scratch, cable():
        work = Path(scratch)
        with served(ModelHub(MODEL, dict(Shards(min(size, PULLED))), stored=False)) as hub:
            pulled = _rounds(_pulls(hub.url, work), work / "hf")
        store(work / "here/hub" / FOLDER, Shards(size))
        synced = _rounds(_syncs(work), work / "spark-2")
    made = f"Made by `python -m benchmarks.model_copies` on {datetime.date.today()}, {machine()}."
    tables = (
        copied_table(f"From a hub on this machine, {_what(min(size, PULLED))}", pulled, min(size, PULLED)),
        copied_table(f"From one network namespace to another, {_what(size)}", synced, size),
    )
    RESULTS.write_text("\n".join(["# Copies of models", "", made, "", *tables]))
    print(RESULTS.read_text())


class Shards(Mapping[str, bytes]):
    """Files of a model with random bytes, each made when it is asked for: together they need not fit into memory."""

    def __init__(self, size: int) -> None:
        self._size = size // SHARDS

    def __getitem__(self, name: str) -> bytes:
        made, piece = random.Random(name), 1 << 26
        return b"".join(made.randbytes(min(piece, self._size - at)) for at in range(0, self._size, piece))

    def __iter__(self) -> Iterator[str]:
        return iter([f"model-{number}-of-{SHARDS}.safetensors" for number in range(1, SHARDS + 1)])

    def __len__(self) -> int:
        return SHARDS


def _what(size: int) -> str:
    return f"{size / 1e9:.2f} GB in {SHARDS} files; the best of {ROUNDS} runs"


def _rounds(ways: Ways, made: Path) -> dict[str, list[Copied]]:
    """Take turns; `made` is removed after each."""
    found: dict[str, list[Copied]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            found[name].append(measured(way))
            shutil.rmtree(made)
    return found


def _pulls(url: str, work: Path) -> Ways:
    version = hub_client.versions()[-1]
    env = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(work / "hf"), "HF_HUB_DISABLE_XET": "1"}
    # This hub has no Xet, which is a protocol of its own.
    client = {**env, "PYTHONPATH": str(hub_client.installed(version))}
    ours = (sys.executable, "-m", "sparkinstall", "models", "pull", MODEL)
    return {
        "`sparkinstall models pull`": lambda: _silently(ours, env),
        f"`hf download`, huggingface_hub {version}": lambda: _silently(
            (sys.executable, "-c", _HF, "download", MODEL), client
        ),
    }


def _syncs(work: Path) -> Ways:
    far = FarNodes(work, CHECKOUT, bootstrap.digest())
    env = {**far.environment(), "HF_HOME": str(work / "here")}

    def ours() -> None:
        far.add_real("spark-2", WORKER, through=f"ip netns exec {WORKER_SPACE}")
        whole = (sys.executable, "-m", "sparkinstall", "models", "sync", MODEL, "spark-2")
        _silently(("ip", "netns", "exec", HEAD_SPACE, *whole), env)

    def rsync(options: tuple[str, ...]) -> Callable[[], None]:
        return lambda: _rsync(work, options)

    return {"`sparkinstall models sync`": ours, **{name: rsync(options) for name, options in CIPHERS.items()}}


def _rsync(work: Path, cipher: tuple[str, ...]) -> None:
    (work / "spark-2").mkdir()
    with sshd(work / "key") as options:
        shell = " ".join(("ssh", "-p", SSH_PORT, *cipher, *options))
        source = f"root@{HEAD}:{work}/here/hub/{FOLDER}"
        program = shutil.which("rsync") or "rsync"
        over = ("ip", "netns", "exec", WORKER_SPACE, program, f"--rsync-path={program}", "-a", "--partial", "--inplace")
        run(*over, "-e", shell, source, f"{work}/spark-2/", timeout=900)


def _silently(argv: tuple[str, ...], env: Mapping[str, str]) -> None:
    done = subprocess.run(argv, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)


if __name__ == "__main__":
    main()
