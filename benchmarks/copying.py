"""The head's wheels to a worker over a cable, compared with scp.

    python -m benchmarks.copying [FOLDER]      as root; writes copying.md

FOLDER: a wheelhouse with the wheels of a stack; that of this user if omitted. Head and worker are two network
namespaces with a cable at MTU 9000 between them. They share the cores and the disk of one machine.
"""

import datetime
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

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
from sparkinstall.cluster.protocol import Introduction, Offer, announced
from sparkinstall.stacks import canonical
from sparkinstall.wheelhouse import Wheelhouse
from tests.lab.commands import run

RESULTS = Path(__file__).with_name("copying.md")
ROUNDS = 3
OURS = "`sparkinstall cluster`"
_STACK = """
name: bench
summary: the wheels of a folder
vllm: "{vllm}"
python: "3.12"
requirements: [vllm=={vllm}]
nccl: {{version: 2.28.9, tag: v2.28.9-1, commit: dbc86fd06e8b0c4517b95d8958a09ccacf9520c9}}
platforms: {{{machine}: {{lock: bench.lock}}}}
"""


def main() -> None:
    """Measure, and write copying.md."""
    house = Wheelhouse(Path(sys.argv[1]).absolute() if sys.argv[1:] else user_cache() / "wheels")
    house.refresh()
    size = sum(kept.size for kept in house.listed().values())
    with tempfile.TemporaryDirectory(dir=user_cache()) as scratch, cable():
        work = Path(scratch)
        ways = {OURS: lambda: _ours(house, work), **_over_ssh(house, work)}
        found: dict[str, list[Copied]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, way in ways.items():
                found[name].append(measured(way))
                shutil.rmtree(work / "worker")
    RESULTS.write_text(_report(found, len(house.listed()), size))
    print(RESULTS.read_text())


def _ours(house: Wheelhouse, work: Path) -> None:
    stack = _stack(house, work)
    (work / "head/sparkinstall").mkdir(parents=True, exist_ok=True)
    if not (wheels := work / "head/sparkinstall/wheels").exists():
        wheels.symlink_to(house.folder)
    with _node(HEAD_SPACE, "head", work, stack, "offer", "1") as head:
        assert head.stdin and head.stderr
        print("a-token", file=head.stdin, flush=True)
        offer = next(each for line in head.stderr if (each := announced(line, Offer)))
        with _node(WORKER_SPACE, "worker", work, stack, "fetch") as worker:
            introduction = msgspec.json.encode(Introduction(offer.port, offer.fingerprint, "a-token")).decode()
            out, err = worker.communicate(f"{introduction}\n")
            if worker.returncode:
                raise RuntimeError(out + err)


def _node(space: str, role: str, work: Path, stack: Path, *verb: str) -> "subprocess.Popen[str]":
    settings = (
        *(f"cluster.role={role}", f"cluster.head={HEAD}", f"cluster.workers=[{WORKER}]"),
        *(f"prefix={work / role}/opt", f"stack={stack}"),
    )
    words = [word for each in settings for word in ("--set", each)]
    argv = ["ip", "netns", "exec", space, sys.executable, "-m", "sparkinstall", "node", *verb]
    env = {**os.environ, "XDG_CACHE_HOME": str(work / role)}
    pipe = subprocess.PIPE
    whole = [*argv, "--only", "environment", *words, "--json"]
    return subprocess.Popen(whole, env=env, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def _stack(house: Wheelhouse, work: Path) -> Path:
    """A stack whose lock has the wheels of the folder."""
    pins = {}
    for name, kept in house.listed().items():
        package, version, *_ = name.split("-")
        pins[canonical(package)] = (version, kept.sha256)
    lock = (f"{name}=={version} --hash=sha256:{digest}\n" for name, (version, digest) in pins.items())
    (work / "bench.lock").write_text("".join(lock))
    (work / "bench.yaml").write_text(_STACK.format(vllm=pins["vllm"][0], machine=platform.machine()))
    return work / "bench.yaml"


def _over_ssh(house: Wheelhouse, work: Path) -> Mapping[str, Callable[[], None]]:
    def way(cipher: str) -> Callable[[], None]:
        return lambda: _scp(house, work, cipher)

    return {f"scp, {cipher}": way(cipher) for cipher in ("aes128-gcm@openssh.com", "chacha20-poly1305@openssh.com")}


def _scp(house: Wheelhouse, work: Path, cipher: str) -> None:
    (work / "worker").mkdir()
    with sshd(work / "key") as options:
        client = ("scp", "-q", "-c", cipher, "-P", SSH_PORT, *options)
        source = f"root@{HEAD}:{house.folder}/*.whl"
        run("ip", "netns", "exec", WORKER_SPACE, *client, source, str(work / "worker"), timeout=600)


def _report(found: Mapping[str, list[Copied]], wheels: int, size: int) -> str:
    made = f"Made by `python -m benchmarks.copying` on {datetime.date.today()}, {machine()}."
    title = f"{wheels} wheels, {size / 1e9:.2f} GB, from one network namespace to another; the best of {ROUNDS} runs"
    return "\n".join(["# Wheels from the head to a worker", "", made, "", copied_table(title, found, size)])


if __name__ == "__main__":
    main()
