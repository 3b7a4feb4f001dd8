"""One record of what runs: read back from vLLM's own processes and from the machine, not from the settings."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence

from msgspec import Struct

from sparkinstall.core.readiness import Phase, Ready
from sparkinstall.core.session import Session
from sparkinstall.errors import Problem
from sparkinstall.facts import gpu, machine
from sparkinstall.facts.units import show
from sparkinstall.layout import VLLM_UNIT
from sparkinstall.node import site_packages
from sparkinstall.redaction import is_secret_name, redact
from sparkinstall.system import Reader

_PACKAGES = ("vllm", "torch", "transformers", "triton", "flashinfer_python", "ray")
_CLOCKS = ("clocks.sm", "clocks.max.sm", "clocks.mem")
_HIDDEN = "[hidden]"
_PRIVATE = r"(?i)(?:^|_)(?:PAT|CREDS?|AUTH|COOKIE|SESSION|WEBHOOK|DSN|PASS)(?:_|$)|(?:ACCESS|PRIVATE)_KEY|PASSPHRASE"


class Process(Struct, frozen=True):
    """A process of vLLM: its words and variables as the kernel has them, without secrets."""

    pid: int
    argv: Sequence[str]
    env: Mapping[str, str]


class Memory(Struct, frozen=True):
    """KiB. `free_blocks`: what is free in blocks of each size; little in large ones means fragmentation."""

    total: int
    available: int
    free_blocks: Mapping[int, int]


class Serving(Struct, frozen=True):
    """What runs since a start that was waited for. `engine`: the process that computes; null: it could not be read.

    `key_file`: the file with the API's key; null: it asks for none.
    """

    url: str
    model: str
    served: str
    recipe: str | None
    revision: str | None
    invocation: str
    started: str
    seconds: float
    phases: Sequence[Phase]
    first_token: float
    server: Process | None
    engine: Process | None
    versions: Mapping[str, str]
    kernel: str
    driver: str
    clocks: Mapping[str, str]
    memory: Memory
    chat: bool = True
    key_file: str | None = None


def record(session: Session, ready: Ready) -> Serving:
    """Read what runs now."""
    node, on = session.node, session.system
    now = show(on, VLLM_UNIT, "MainPID", "InvocationID", "ExecMainStartTimestamp")
    server = process_of(on, int(now["MainPID"] or 0))
    return Serving(
        url=f"http://127.0.0.1:{node.config.serving.port}/v1",
        model=ready.model,
        served=str(node.config.serving.model),
        recipe=node.config.serving.recipe,
        revision=node.config.serving.revision,
        invocation=now["InvocationID"],
        started=now["ExecMainStartTimestamp"],
        seconds=ready.seconds,
        phases=ready.phases,
        first_token=ready.first_token,
        server=server,
        engine=engine_of(on, server.pid) if server else None,
        versions=dict(versions(on, site_packages(node, on) or "")),
        kernel=line_of(on, "/proc/sys/kernel/osrelease"),
        driver=gpu.loaded_driver(on),
        clocks=clocks(on),
        memory=memory(on),
        chat=ready.chat,
        key_file=node.api_key,
    )


def line_of(on: Reader, path: str) -> str:
    """Return a file of the kernel as text; "" if there is none."""
    return (on.read(path) or b"").decode(errors="replace").strip()


def process_of(on: Reader, pid: int) -> Process | None:
    """Read a process; None: there is none, or it cannot be read."""
    try:
        argv, env = (on.read(f"/proc/{pid}/{name}") for name in ("cmdline", "environ"))
    except (OSError, Problem):
        return None
    if not argv:
        return None
    # As JSON a word that follows `--api-key` is recognised as its value.
    words = json.loads(redact(json.dumps(_words(argv))))
    # A process that changes its title may have written over its variables.
    pairs = (each.partition("=") for each in _words(env or b"") if "=" in each[1:])
    return Process(pid, words, {name: _HIDDEN if _is_private(name) else redact(value) for name, _, value in pairs})


def _is_private(name: str) -> bool:
    """Return whether a variable may hold a secret: a server that was started by hand has all those of a login shell."""
    return is_secret_name(name) or re.search(_PRIVATE, name) is not None


def _words(data: bytes) -> list[str]:
    return [each.decode(errors="replace") for each in data.rstrip(b"\0").split(b"\0")]


def engine_of(on: Reader, server: int) -> Process | None:
    """Return the engine's process among the children of the server's; it has a title of its own."""
    for pid in children(on, server):
        if "EngineCore" in line_of(on, f"/proc/{pid}/cmdline").replace("\0", " "):
            return process_of(on, pid)
    return None


def children(on: Reader, pid: int) -> Iterator[int]:
    """Yield the ids of all processes that a process has started, directly or not."""
    for child in map(int, line_of(on, f"/proc/{pid}/task/{pid}/children").split()):
        yield child
        yield from children(on, child)


def versions(on: Reader, site: str) -> Iterator[tuple[str, str]]:
    """Yield the packages of an environment that decide how it serves, with their versions."""
    for name in on.names(site):
        if found := re.fullmatch(rf"({'|'.join(_PACKAGES)})-(.+)\.dist-info", name):
            yield found[1], found[2]


def clocks(on: Reader) -> dict[str, str]:
    """Return the clocks of the first GPU as nvidia-smi writes them; {} without one."""
    answer = on.ask("nvidia-smi", f"--query-gpu={','.join(_CLOCKS)}", "--format=csv,noheader")
    values = [each.strip() for each in answer.out.split("\n")[0].split(",")]
    return dict(zip(_CLOCKS, values, strict=False)) if answer.ok else {}


def memory(on: Reader) -> Memory:
    """Read the memory of the machine."""
    found = machine.parse_meminfo(on.read("/proc/meminfo") or b"")
    return Memory(found.get("MemTotal", 0), found.get("MemAvailable", 0), machine.free_blocks(on))
