"""What a process that starts with the env file really is: which modules, which NCCL, which address."""

import json
import signal
from collections.abc import Iterable, Mapping
from functools import cached_property

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from sparkinstall import fixes, payloads
from sparkinstall.node import Node
from sparkinstall.probes import Finding, Probe, failed, kernels, nccl, passed
from sparkinstall.probes.env_file import with_env_file
from sparkinstall.probes.nccl import Loaded
from sparkinstall.system import Reader

MODULES = ("torch", "triton", "transformers", "ray", "vllm")
_TIMEOUT = 300.0


class Module(Struct, frozen=True):
    """A module that was imported, or the `error` in words."""

    version: str = ""
    error: str = ""


class Reply(kernels.Answer, frozen=True):
    """What payloads/inspect_env.py says of its process; `error`: why it did not come so far.

    `address` is what vLLM takes for this node's own, `wanted_address` what the env file says.
    """

    error: str = ""
    modules: Mapping[str, Module] = {}
    nccl: Loaded = Loaded("", 0, ())
    address: str = ""
    wanted_address: str = ""


class InEnvironment(Struct, frozen=True, dict=True):
    """One process, started with the env file as a service would be; asked once for all probes."""

    node: Node
    on: Reader

    @cached_property
    def answer(self) -> Reply:
        """What it said of itself."""
        asked = {"modules": () if self.node.partial else MODULES, "arch": self.node.config.nccl.arch}
        # -P: vLLM's own program does not look for modules in the folder where it was started, either.
        command = ("python", "-P", "-c", payloads.source("inspect_env"), json.dumps(asked))
        said = with_env_file(self.node, self.on, *command, timeout=_TIMEOUT)
        try:
            # Not msgspec's decoder: a product may be off by what is no number (NaN).
            return msgspec.convert(json.loads(said.out.splitlines()[-1]), Reply)
        except (ValueError, IndexError):
            last = [line for line in said.err.splitlines() if line.strip()][-1:]
            return Reply(error=last[0] if last else f"it ended with {_end(said.code)}")


def probes(node: Node) -> Iterable[Probe]:
    """The probes of a process; all ask the same one."""
    shared: dict[int, InEnvironment] = {}

    def process(on: Reader) -> InEnvironment:
        return shared.setdefault(id(on), InEnvironment(node, on))

    alone = "a rehearsal installs vLLM's wheel alone (--full installs the rest)" if node.partial else ""
    yield Probe(
        "imports",
        "vLLM and its parts import",
        lambda on: _imports(node, on, process(on)),
        "gpu",
        "vLLM does not start.",
        fixes.PACKAGES,
        needs_node=alone,
    )
    yield Probe(
        "nccl-loaded",
        "the NCCL that is really loaded",
        lambda on: _nccl(node, on, process(on)),
        "gpu",
        nccl.MISMATCH,
        fixes.NCCL,
    )
    yield Probe(
        "host-ip",
        "vLLM takes the address of the env file",
        lambda on: _address(node, on, process(on)),
        "gpu",
        "Ray and vLLM name this node differently: `Expected 2 unique IPs but got 3`.",
        fixes.HOST_IP,
        needs_node=alone,
    )
    yield from kernels.probes(node, lambda on: _answer(node, on, process(on)), alone)


def _answer(node: Node, on: Reader, process: InEnvironment, wanted: str = "") -> Reply | Finding:
    """What the process says of itself, or why it says nothing."""
    if stop := nccl.not_here(node, on):
        return stop
    answer = process.answer
    return failed(answer.error, "run `sparkinstall all`", wanted) if answer.error else answer


def _end(code: int) -> str:
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"code {code}"


def _imports(node: Node, on: Reader, process: InEnvironment) -> Finding:
    if isinstance(answer := _answer(node, on, process, ", ".join(MODULES)), Finding):
        return answer
    if broken := [f"{name}: {each.error}" for name, each in answer.modules.items() if each.error]:
        return failed("; ".join(broken), "run `sparkinstall all`", ", ".join(MODULES))
    return passed(", ".join(f"{name} {each.version}" for name, each in answer.modules.items()))


def _nccl(node: Node, on: Reader, process: InEnvironment) -> Finding:
    if stop := nccl.not_here(node, on):
        return stop
    if isinstance(library := nccl.library(node, on), Finding):
        return library
    if isinstance(answer := _answer(node, on, process, library), Finding):
        return answer
    loaded = answer.nccl
    if not loaded.bound:
        told = f"torch would take {', '.join(loaded.mapped)}" if loaded.mapped else "no NCCL is loaded"
        return failed(told, nccl.REWRITE_ENV, nccl.wanted(library))
    found = nccl.judged(node, library, loaded)
    return replace(found, found=f"{found.found} (torch is not installed in this rehearsal)") if node.partial else found


def _address(node: Node, on: Reader, process: InEnvironment) -> Finding:
    if isinstance(answer := _answer(node, on, process), Finding):
        return answer
    if not answer.address:
        return failed("vLLM's get_ip() gave no answer", "run `sparkinstall all`")
    if answer.address != answer.wanted_address:
        return failed(answer.address, "set VLLM_HOST_IP through the env file", answer.wanted_address)
    return passed(answer.address, answer.wanted_address)
