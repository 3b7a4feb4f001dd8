"""Inspect a process started with the env file: its modules, NCCL, address and kernels."""

import json
import signal
from collections.abc import Iterable, Mapping
from functools import cached_property

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from sparkinstall import fixes, payloads
from sparkinstall.facts.env_file import with_env_file
from sparkinstall.node import Node
from sparkinstall.probes import Finding, Probe, failed, kernels, nccl, passed
from sparkinstall.probes.nccl import Loaded
from sparkinstall.system import Reader

MODULES = ("torch", "triton", "transformers", "ray", "vllm")
_TIMEOUT = 300.0


class Module(Struct, frozen=True):
    """An imported module, or the `error` of its import."""

    version: str = ""
    error: str = ""


class Reply(kernels.Answer, frozen=True):
    """The reply of payloads/inspect_env.py; `error`: why there is none.

    `address` is the one that vLLM uses for this node, `wanted_address` the one in the env file.
    """

    error: str = ""
    modules: Mapping[str, Module] = {}
    nccl: Loaded = Loaded("", 0, ())
    address: str = ""
    wanted_address: str = ""


class InEnvironment(Struct, frozen=True, dict=True):
    """One process started with the env file as a service would be; runs once for all probes."""

    node: Node
    on: Reader

    @cached_property
    def answer(self) -> Reply:
        asked = {"modules": () if self.node.partial else MODULES, "arch": self.node.config.nccl.arch}
        # -P: like vLLM's own program, do not search the current folder for modules.
        command = ("python", "-P", "-c", payloads.source("inspect_env"), json.dumps(asked))
        said = with_env_file(self.node, self.on, *command, timeout=_TIMEOUT)
        try:
            # Not msgspec's decoder: the error of a product may be NaN.
            return msgspec.convert(json.loads(said.out.splitlines()[-1]), Reply)
        except (ValueError, IndexError):
            return Reply(error=said.last_line or f"the process ended with {_end(said.code)}")


def probes(node: Node) -> Iterable[Probe]:
    """Yield the probes of a process started with the env file; all share one process."""
    shared: dict[int, InEnvironment] = {}

    def process(on: Reader) -> InEnvironment:
        return shared.setdefault(id(on), InEnvironment(node, on))

    alone = "a rehearsal installs only vLLM's wheel (--full installs the rest)" if node.partial else ""
    yield Probe(
        "imports", "import of vLLM and its dependencies", lambda on: _imports(node, on, process(on)), "gpu",
        "vLLM does not start.", fixes.PACKAGES, needs_node=alone,
    )  # fmt: skip
    yield Probe(
        "nccl-loaded", "NCCL loaded by torch", lambda on: _nccl(node, on, process(on)), "gpu", nccl.MISMATCH, fixes.NCCL
    )
    yield Probe(
        "host-ip", "vLLM uses the address in the env file", lambda on: _address(node, on, process(on)), "gpu",
        "Ray and vLLM use different addresses for this node: `Expected 2 unique IPs but got 3`.", fixes.HOST_IP,
        needs_node=alone,
    )  # fmt: skip
    yield from kernels.probes(node, lambda on: _answer(node, on, process(on)), alone)


def _answer(node: Node, on: Reader, process: InEnvironment, wanted: str = "") -> Reply | Finding:
    """Return the reply of the process, or the finding that explains its absence."""
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
        told = f"torch would use {', '.join(loaded.mapped)}" if loaded.mapped else "no NCCL is loaded"
        return failed(told, nccl.REWRITE_ENV, nccl.wanted(library))
    found = nccl.judged(node, library, loaded)
    return replace(found, found=f"{found.found} (torch is not installed in this rehearsal)") if node.partial else found


def _address(node: Node, on: Reader, process: InEnvironment) -> Finding:
    if isinstance(answer := _answer(node, on, process), Finding):
        return answer
    if not answer.address:
        return failed("vLLM's get_ip() returned nothing", "run `sparkinstall all`")
    if answer.address != answer.wanted_address:
        return failed(answer.address, "set VLLM_HOST_IP through the env file", answer.wanted_address)
    return passed(answer.address, answer.wanted_address)
