"""Probes of processes started with the env file: a new small process, and the running services."""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence

import msgspec
from msgspec import Struct

from sparkinstall import fixes, payloads
from sparkinstall.errors import NeedsRoot
from sparkinstall.facts.env_file import assignments, with_env_file
from sparkinstall.node import Node
from sparkinstall.probes import Finding, Probe, failed, nccl, passed, skipped, warned
from sparkinstall.redaction import is_secret_name
from sparkinstall.services import env_units
from sparkinstall.system import Reader

_LIBRARY = re.compile(r" (/\S.*/libnccl\.so[^/\n]*)$", re.MULTILINE)
_DELETED = " (deleted)"
# Variables that depend on settings: a process that still has one was started with another env file.
_SOMETIMES = (
    *("LD_PRELOAD", "VLLM_NCCL_SO_PATH", "VLLM_DISABLED_KERNELS", "VLLM_CONFIG_ROOT", "RAY_ADDRESS", "RAY_AUTH_MODE"),
    *("NCCL_IB_HCA", "NCCL_IB_GID_INDEX", "NCCL_NET_GDR_LEVEL", "NCCL_P2P_DISABLE"),
)


def probes(node: Node) -> Iterable[Probe]:
    """Yield the quick probes, which load neither torch nor vLLM."""
    yield Probe(
        "nccl-preload", "NCCL in a new process", lambda on: _preload(node, on), "node",
        "NCCL differs from the one that was set up, or is not loaded at all.", fixes.NCCL,
    )  # fmt: skip
    if env_units(node):
        yield Probe(
            "running-env", "variables of the running services", lambda on: _env(node, on), "node",
            "Running services lack variables that were set later: they need a restart.",
        )  # fmt: skip
        yield Probe(
            "running-nccl", "NCCL in the running services", lambda on: _nccl(node, on), "node",
            nccl.MISMATCH, fixes.NCCL,
        )  # fmt: skip


# --- a new process


def _preload(node: Node, on: Reader) -> Finding:
    if stop := nccl.not_here(node, on):
        return stop
    if isinstance(library := nccl.library(node, on), Finding):
        return library
    said = with_env_file(node, on, "python", "-I", "-c", payloads.source("loaded_nccl"))
    complaint = next((line for line in said.err.splitlines() if "LD_PRELOAD" in line), "")
    if complaint:
        return failed(complaint.strip(), nccl.REWRITE_ENV, library)
    try:
        loaded = msgspec.json.decode(said.out.splitlines()[-1], type=nccl.Loaded)
    except (ValueError, IndexError):
        return failed(said.last_line or f"it ended with code {said.code}", nccl.REWRITE_ENV, library)
    if not loaded.bound:
        told = "a process started with the env file did not load NCCL"
        return failed(told, nccl.REWRITE_ENV, nccl.wanted(library))
    return nccl.judged(node, library, loaded)


# --- the running services


class Process(Struct, frozen=True):
    """A process of one of our services. `began`: start time in clock ticks after the boot."""

    pid: int
    unit: str
    name: str
    began: int


def processes_of(names: Iterable[str], on: Reader) -> list[Process]:
    """Return the processes in the control groups of these services, oldest first, whatever their parent."""
    wanted = {f"/{name}/": name for name in names}
    found = []
    for pid in map(int, filter(str.isdigit, on.names("/proc"))):
        groups = (_of(on, pid, "cgroup") or b"").decode(errors="replace").splitlines()
        unit = next((name for part, name in wanted.items() for group in groups if part in f"{group}/"), None)
        if unit and (stat := _of(on, pid, "stat")):
            # `pid (name) state parent ...`; the name may contain blanks and parentheses.
            name, _, rest = stat.decode(errors="replace").partition("(")[2].rpartition(")")
            found.append(Process(pid, unit, name, int(rest.split()[19])))
    return sorted(found, key=lambda each: (each.began, each.pid))


def _of(on: Reader, pid: int, what: str) -> bytes | None:
    """Return `/proc/PID/what`; None if the process has ended.

    Raises:
        NeedsRoot: it belongs to another user and sudo needs a password, or not even root may read it.
    """
    try:
        return on.read(f"/proc/{pid}/{what}")
    except ProcessLookupError:
        return None
    except PermissionError as error:
        raise NeedsRoot(f"/proc/{pid}/{what} cannot be read", hint="run it outside of a container") from error


def _env(node: Node, on: Reader) -> Finding:
    if isinstance(running := _running(node, on), Finding):
        return running
    # Only processes that systemd started: their children may set variables for reasons of their own.
    first = {process.unit: process for process in reversed(running)}
    try:
        differs = {unit: list(_differences(node, on, process)) for unit, process in first.items()}
    except NeedsRoot as problem:
        return skipped(f"{problem.message}: {problem.hint}")
    wrong = {unit: each for unit, each in differs.items() if each}
    if not wrong:
        return passed(f"{_listed(first)}: as in the env file", on.real(node.env_file))
    told = "; ".join(f"{unit} was started with {', '.join(each)}" for unit, each in wrong.items())
    stays = f"if they remain, `systemctl cat {' '.join(wrong)}` shows what else sets them"
    return warned(told, f"{_restart(wrong)}; {stays}", f"as in {on.real(node.env_file)}")


def _running(node: Node, on: Reader) -> list[Process] | Finding:
    found = processes_of(env_units(node), on)
    down = [unit for unit in env_units(node) if not any(each.unit == unit for each in found)]
    if len(down) == len(env_units(node)):
        return skipped(f"{_listed(down)}: not running")
    return found


def _differences(node: Node, on: Reader, process: Process) -> Iterator[str]:
    now = _variables(on, process)
    if not now:
        return
    says = _read_by(process.unit, node, on)
    for name in sorted(says):
        if now.get(name) != says[name]:
            yield difference(name, now.get(name), says[name])
    for name in _SOMETIMES:
        if name in now and name not in says:
            yield difference(name, now[name], None)


def _variables(on: Reader, process: Process) -> dict[str, str]:
    """Return the variables at its start; {} if it has ended, or its title overwrote them."""
    has = _of(on, process.pid, "environ") or b""
    return dict(each.partition("=")[::2] for each in has.decode(errors="replace").split("\0") if "=" in each)


def difference(name: str, now: str | None, says: str | None) -> str:
    if is_secret_name(name):
        return f"another {name}"
    if now is None:
        return f"no {name}"
    return f"{name}={now} (the file says {says})" if says is not None else f"{name}={now} (the file has none)"


def _read_by(unit: str, node: Node, on: Reader) -> dict[str, str]:
    """Return the variables that systemd would set now: the env file, then the link's, found at start."""
    link = f"/run/{unit.removesuffix('.service')}/link.env"
    return {name: value for path in (node.env_file, link) for name, value in assignments(on.read(path) or b"").items()}


def _nccl(node: Node, on: Reader) -> Finding:
    if isinstance(library := nccl.library(node, on), Finding):
        return library
    if isinstance(running := _running(node, on), Finding):
        return running
    try:
        with_nccl = {process: found for process in running if (found := _mapped(on, process))}
        strange = {p: other for p, found in with_nccl.items() if (other := _other(on, p, found, library))}
    except NeedsRoot as problem:
        return skipped(f"{problem.message}: {problem.hint}")
    wanted = nccl.wanted(library)
    if strange:
        told = ", ".join(f"{p.name} (pid {p.pid}) has {path}" for p, path in strange.items())
        return _of_strangers(told, {p.unit for p in strange}, list(strange.values()), wanted)
    if not with_nccl:
        return passed(f"{_counted(running)}, none of which has loaded one yet")
    return passed(_counted(with_nccl), wanted)


def _of_strangers(told: str, of_units: Iterable[str], paths: Iterable[str], wanted: str) -> Finding:
    """Judge another library: a replaced one needs a restart; any other means that the env file is not used."""
    if all(path.endswith(_DELETED) for path in paths):
        return warned(f"{told}: replaced since the start", _restart(of_units), wanted)
    return failed(
        told, f"{_restart(of_units)}; LD_PRELOAD must reach every process: `sparkinstall run ray serving`", wanted
    )


def _mapped(on: Reader, process: Process) -> tuple[str, ...]:
    maps = _of(on, process.pid, "maps") or b""
    return tuple(dict.fromkeys(_LIBRARY.findall(maps.decode(errors="replace"))))


def _other(on: Reader, process: Process, mapped: Sequence[str], library: str) -> str | None:
    """Return the library that the process uses instead of ours; None if it uses ours, whatever else is mapped."""
    others = [path for path in mapped if path.endswith(_DELETED) or not nccl.is_same_build(path, library)]
    if not others or (len(others) < len(mapped) and _preloads(on, process, library)):
        return None
    return others[0]


def _preloads(on: Reader, process: Process, library: str) -> bool:
    """Return whether ours was preloaded, so that torch does not use its wheel's; assume so if it cannot be read."""
    variables = _variables(on, process)
    named = variables.get("LD_PRELOAD", "").replace(":", " ").split()
    return not variables or any(nccl.is_same_build(path, library) for path in named)


def _restart(of_units: Iterable[str]) -> str:
    return f"`sudo systemctl restart {' '.join(sorted(set(of_units)))}`"


def _counted(processes: Collection[Process]) -> str:
    number = len(processes)
    return f"{number} process{'es' if number != 1 else ''} of {_listed(each.unit for each in processes)}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names))
