"""What made a number: the server's process and settings, and the state of its machine before and after."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from msgspec import Struct, field

from sparkinstall.core import serve_record
from sparkinstall.core.fit import BANDWIDTH, FitOptions, fit
from sparkinstall.core.memory import memory_of
from sparkinstall.core.readiness import Phase
from sparkinstall.core.serve import last_record
from sparkinstall.core.serve_record import Memory, Process
from sparkinstall.core.session import Session
from sparkinstall.errors import Problem
from sparkinstall.facts import gpu, machine, vllm
from sparkinstall.facts.sysfs import text_of
from sparkinstall.facts.units import show
from sparkinstall.layout import VLLM_UNIT
from sparkinstall.models.files import Files, LocalFiles
from sparkinstall.models.hub import cached, is_name
from sparkinstall.recipes.serve_options import last_of_each, options
from sparkinstall.system import Reader

_GPU = (
    "name",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "temperature.gpu",
    "power.draw",
    "utilization.gpu",
    "pstate",
)
_LISTENER = re.compile(r"pid=(\d+)")
# Part of a core from which on another process is named.
_BUSY = 0.02
_MOST_NAMED = 10
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_PARALLEL = "--tensor-parallel-size"


class Served(Struct, frozen=True):
    """The server. Null or "": unknown, because it is not on this machine, or not started by `serve`.

    `root`: the folder or name of the model. `context`: tokens that it accepts. `speculative`: vLLM's own option.
    `ready` and `phases`: seconds from the start to the first answer. `ceiling`: tokens a second that the bandwidth of
    the memory allows for one sequence, null with `no_ceiling` as the reason.
    """

    url: str
    model: str
    root: str
    vllm: str
    context: int | None
    prefix_cache: bool | None
    speculative: str
    settings: Mapping[str, str]
    recipe: str | None
    revision: str | None
    started: str
    invocation: str
    ready: float | None
    phases: Sequence[Phase]
    process: Process | None
    engine: Process | None
    versions: Mapping[str, str]
    ceiling: float | None
    no_ceiling: str


class Host(Struct, frozen=True):
    """The machine. `kho`: the kernel's option, "" without one."""

    product: str
    system: str
    kernel: str
    kho: str
    firmware: str
    driver: str
    gpu: str
    cores: int
    memory: int


class Busy(Struct, frozen=True):
    """Another process: its name, and the part of a core that it used."""

    name: str
    pid: int
    cores: float


class State(Struct, frozen=True):
    """The machine at one moment. `gpu` as nvidia-smi writes it, `temperatures` in °C by sensor, `uptime` in seconds."""

    uptime: float
    load: str
    memory: Memory
    gpu: Mapping[str, str]
    temperatures: Mapping[str, float]


class Interfaces(Struct, frozen=True):
    """What the server answers beside completions. `metrics`: the text of /metrics, "" if it has none."""

    model: str
    root: str
    context: int | None
    vllm: str
    metrics: str


class _Ticks(Struct, frozen=True):
    at: float
    used: dict[int, tuple[str, int]] = field(default_factory=dict)


def served(session: Session, on: Reader | None, url: str, port: int, said: Interfaces) -> Served:
    """Read the server back; `on`: its machine, None if that is another."""
    process = listener(on, port, None if session.node.rehearsal else session.node.config.serving.port) if on else None
    engine = serve_record.engine_of(on, process.pid) if on and process else None
    labels = cache_settings(said.metrics)
    argv = process.argv if process else ()
    chosen = {each[0]: " ".join(each[1:]) for each in last_of_each(options(argv)[1])}
    ceiling, why = ceiling_of(on, said.root, chosen) if on else (None, "the server is on another machine")
    now = _unit(session, on, process)
    known = last_record(session) if now else None
    current = known if known and now and known.invocation == now["InvocationID"] else None
    return Served(
        url=url,
        model=said.model,
        root=said.root,
        vllm=said.vllm,
        context=said.context,
        prefix_cache=_bool(labels.get(vllm.PREFIX_CACHING)),
        speculative=chosen.get("--speculative-config", ""),
        settings=labels,
        recipe=session.node.config.serving.recipe if now else None,
        revision=session.node.config.serving.revision if now else None,
        started=now["ExecMainStartTimestamp"] if now else "",
        invocation=now["InvocationID"] if now else "",
        ready=current.seconds if current else None,
        phases=current.phases if current else (),
        process=process,
        engine=engine,
        versions=dict(serve_record.versions(on, _site_of(on, process))) if on and process else {},
        ceiling=ceiling,
        no_ceiling=why,
    )


def _unit(session: Session, on: Reader | None, process: Process | None) -> dict[str, str] | None:
    """Return what systemd says of the server, None if it is not that of this node."""
    if on is None or process is None or session.node.rehearsal:
        return None
    now = show(on, VLLM_UNIT, "MainPID", "InvocationID", "ExecMainStartTimestamp")
    return now if now["MainPID"] == str(process.pid) else None


def listener(on: Reader, port: int, of_unit: int | None) -> Process | None:
    """Return the process that listens at a port of this machine.

    Args:
        of_unit: the port of this node's unit, whose process is the one if `ss` is not installed; None: there is none.
    """
    answer = on.ask("ss", "-Hltnp")
    for line in answer.out.splitlines():
        words, found = line.split(), _LISTENER.search(line)
        if found and len(words) > 3 and words[3].endswith(f":{port}"):
            return serve_record.process_of(on, int(found[1]))
    if not answer.ok and port == of_unit:
        return serve_record.process_of(on, int(show(on, VLLM_UNIT, "MainPID")["MainPID"] or 0))
    return None


def _site_of(on: Reader, process: Process) -> str:
    """Return the site-packages of the environment that a process was started from; "" if that is not seen."""
    for word in process.argv[:2]:
        folder = os.path.dirname(os.path.dirname(word))
        for name in on.names(f"{folder}/lib") if word.startswith("/") else ():
            if name.startswith("python3."):
                return f"{folder}/lib/{name}/site-packages"
    return ""


def cache_settings(metrics: str) -> dict[str, str]:
    """Return the settings of the cache that /metrics has as labels."""
    line = next((each for each in metrics.splitlines() if each.startswith(vllm.CACHE_CONFIG + "{")), "")
    return {name: value for name, value in _LABEL.findall(line) if name != "engine"}


def _bool(text: str | None) -> bool | None:
    return {"True": True, "False": False}.get(text or "")


def ceiling_of(on: Reader, root: str, chosen: Mapping[str, str]) -> tuple[float | None, str]:
    """Return the decode rate that a Spark's memory allows for the served model, or why that is unknown."""
    if not machine.has_gb10(on):
        return None, "this machine is not a Spark, whose bandwidth is known"
    if "--speculative-config" in chosen:
        return None, "speculative decoding makes several tokens of one pass"
    files = _files(root)
    if files is None:
        return None, f"the files of {root or 'the model'} are not on this machine"
    parallel = chosen.get(_PARALLEL, "1")
    asked = FitOptions(
        tensor_parallel=int(parallel) if parallel.isdigit() else 1, quantized_at_load="--quantization" in chosen
    )
    try:
        decode = fit(root, files, asked, memory_of(on, 1), "0").decode
    except Problem as problem:
        return None, problem.message
    # No context yet: what the prompt adds only lowers it.
    return decode.ceiling, decode.read.why if decode.ceiling is None else f"{BANDWIDTH / 1e9:.0f} GB/s"


def _files(root: str) -> Files | None:
    if root.startswith("/"):
        return LocalFiles(Path(root))
    return cached(root, "") if is_name(root) else None


def host(on: Reader) -> Host:
    """Read the machine."""
    found = gpu.first_gpu(on)
    return Host(
        product=machine.product(on),
        system=machine.os_version(on) or machine.system_name(machine.os_release(on)),
        kernel=serve_record.line_of(on, "/proc/sys/kernel/osrelease"),
        kho=machine.boot_option(on, "kho"),
        firmware=machine.uefi_version(on),
        driver=gpu.loaded_driver(on),
        gpu=found.name if found else "",
        cores=machine.cores(),
        memory=machine.parse_meminfo(on.read("/proc/meminfo") or b"").get("MemTotal", 0),
    )


def state(on: Reader) -> State:
    """Read how the machine is now."""
    answer = on.ask("nvidia-smi", f"--query-gpu={','.join(_GPU)}", "--format=csv,noheader")
    values = [each.strip() for each in answer.out.split("\n")[0].split(",")] if answer.ok else []
    return State(
        uptime=float((text_of(on, "/proc/uptime") or "0").split()[0]),
        load=" ".join(text_of(on, "/proc/loadavg").split()[:3]),
        memory=serve_record.memory(on),
        gpu=dict(zip(_GPU, values, strict=False)),
        temperatures=dict(_temperatures(on)),
    )


def _temperatures(on: Reader) -> Iterator[tuple[str, float]]:
    folder = "/sys/class/thermal"
    for name in on.names(folder):
        degrees = text_of(on, f"{folder}/{name}/temp")
        if name.startswith("thermal_zone") and re.fullmatch(r"-?\d+", degrees):
            yield f"{name} {text_of(on, f'{folder}/{name}/type')}".strip(), int(degrees) / 1000


def ticks(on: Reader, at: float) -> _Ticks:
    """Read what each process has used of the processor so far; `at`: when, in seconds."""
    used: dict[int, tuple[str, int]] = {}
    for name in on.names("/proc"):
        line = text_of(on, f"/proc/{name}/stat") if name.isdigit() else ""
        command, closed, rest = line.partition("(")[2].rpartition(")")
        fields = rest.split()
        if closed and len(fields) > 12:
            used[int(name)] = (command, int(fields[11]) + int(fields[12]))
    return _Ticks(at, used)


def busy(before: _Ticks, after: _Ticks, ours: Sequence[int]) -> list[Busy]:
    """Return the other processes that were busy between two readings, busiest first."""
    seconds, hertz = max(after.at - before.at, 0.001), os.sysconf("SC_CLK_TCK")
    found = [
        Busy(name, pid, round((used - before.used.get(pid, ("", 0))[1]) / hertz / seconds, 3))
        for pid, (name, used) in after.used.items()
        if pid not in ours
    ]
    return sorted((each for each in found if each.cores > _BUSY), key=lambda each: -each.cores)[:_MOST_NAMED]


def family(on: Reader, process: Process | None) -> list[int]:
    """Return the ids of a server's processes, and of this one."""
    return [os.getpid(), *([process.pid, *serve_record.children(on, process.pid)] if process else [])]
