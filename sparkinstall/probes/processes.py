"""What a process that starts with the env file really is: which modules, which NCCL, which address."""

import ast
import json
import os
import signal
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from sparkinstall import binaries
from sparkinstall.node import Node, nccl_library, site_packages
from sparkinstall.probes import Finding, Probe, failed, kernels, passed, skipped, warned
from sparkinstall.records import dataclass
from sparkinstall.system import Reader

MODULES = ("torch", "triton", "transformers", "ray", "vllm")
_TIMEOUT = 300.0


@dataclass(frozen=True)
class InEnvironment:
    """One process, started with the env file as a service would be; asked once for all probes."""

    node: Node
    on: Reader

    @cached_property
    def answer(self) -> dict[str, Any]:
        """What it said of itself; with the key `error` where it did not come so far."""
        env_file = self.on.real(self.node.env_file)
        # -P: vLLM's own program does not look for modules in the folder where it was started, either.
        command = '. "$1" && exec python -P -c "$2" "$3"'
        look = Path(__file__).with_name("inside.py").read_text()
        asked = {"modules": () if self.node.partial else MODULES, "arch": self.node.config.nccl.arch}
        env = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": self.node.home}
        said = self.on.query(
            "bash", "-c", command, "bash", env_file, look, json.dumps(asked), timeout=_TIMEOUT, env=env
        )
        try:
            found = json.loads(said.out.splitlines()[-1])
        except (ValueError, IndexError):
            last = [line for line in said.err.splitlines() if line.strip()][-1:]
            return {"error": last[0] if last else f"it ended with {_end(said.code)}"}
        return dict(found)


def probes(node: Node) -> Iterable[Probe]:
    """The probes of a process; all ask the same one."""
    shared: dict[int, InEnvironment] = {}

    def process(on: Reader) -> InEnvironment:
        return shared.setdefault(id(on), InEnvironment(node, on))

    yield Probe("imports", "vLLM and its parts import", lambda on: _imports(node, on, process(on)), "gpu")
    yield Probe("nccl-loaded", "the NCCL that is really loaded", lambda on: _nccl(node, on, process(on)), "gpu")
    yield Probe("host-ip", "vLLM takes the address of the env file", lambda on: _address(node, on, process(on)), "gpu")
    yield from kernels.probes(node, lambda on: _answer(node, on, process(on)))


def _answer(node: Node, on: Reader, process: InEnvironment) -> dict[str, Any] | Finding:
    """What the process says of itself, or why it says nothing."""
    if stop := _not_here(node, on):
        return stop
    if node.partial:
        return skipped("torch, Triton and vLLM do not run in a rehearsal without --full")
    if "error" in process.answer:
        return failed(process.answer["error"], "run `sparkinstall all`")
    return process.answer


def _end(code: int) -> str:
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"code {code}"


def _not_here(node: Node, on: Reader) -> Finding | None:
    """Why no process can be started here, as a skip or a fail; None: it can."""
    if on.entry(node.env_file) is None:
        return failed("there is no env file", "run `sparkinstall all`")
    if node.foreign:
        return skipped(f"these wheels are for {node.platform}: nothing of them runs here")
    return None


def _imports(node: Node, on: Reader, process: InEnvironment) -> Finding:
    if stop := _not_here(node, on):
        return stop
    if node.partial:
        return skipped("a rehearsal installs vLLM's wheel alone (--full installs the rest)")
    if "error" in process.answer:
        return failed(process.answer["error"], "run `sparkinstall all`", ", ".join(MODULES))
    broken = {name: each["error"] for name, each in process.answer["modules"].items() if "error" in each}
    if broken:
        return failed(
            "; ".join(f"{n}: {why}" for n, why in broken.items()),
            "run `sparkinstall all`",
            ", ".join(MODULES),
        )
    versions = {name: each["version"] for name, each in process.answer["modules"].items()}
    return passed(", ".join(f"{name} {version}" for name, version in versions.items()))


def _nccl(node: Node, on: Reader, process: InEnvironment) -> Finding:
    if stop := _not_here(node, on):
        return stop
    library = nccl_library(node, on)
    if library is None or on.entry(library) is None:
        return (
            skipped("no NCCL was built here: left to the node")
            if on.rehearsal
            else failed("no NCCL was built", "run `sparkinstall all`")
        )
    if "error" in process.answer:
        return failed(process.answer["error"], "run `sparkinstall all`", on.real(library))
    return _compare_nccl(node, Path(on.real(library)), process.answer)


def _compare_nccl(node: Node, library: Path, answer: dict[str, Any]) -> Finding:
    bound, wanted = answer["nccl_bound"], f"{library}, build-id {binaries.build_id(library)}"
    if not bound:
        mapped = ", ".join(answer["nccl"])
        return failed(f"torch would take {mapped}" if mapped else "no NCCL is loaded", _PRELOAD, wanted)
    if binaries.build_id(bound) != binaries.build_id(library):
        return failed(f"{bound}, build-id {binaries.build_id(bound)}", _PRELOAD, wanted)
    version = _in_words(int(answer["nccl_version"]))
    if version != node.nccl_version.split("-")[0]:
        return failed(f"it says it is {version}", "run `sparkinstall run nccl`", node.nccl_version)
    if f"sm_{node.config.nccl.arch}" not in {code.arch for code in binaries.gpu_code(library)}:
        return warned(f"{version}, without code for sm_{node.config.nccl.arch}: {bound}", _BUILD, wanted)
    return passed(f"{version}, {os.path.realpath(bound)}, build-id {_short_id(library)}{_beside(node, answer)}", wanted)


def _short_id(library: Path) -> str:
    return str(binaries.build_id(library))[:12]


def _beside(node: Node, answer: dict[str, Any]) -> str:
    """What a reader of the process's maps may wonder about."""
    if node.partial:
        return " (torch is not installed in this rehearsal)"
    others = [path for path in answer["nccl"] if not os.path.samefile(path, answer["nccl_bound"])]
    # torch from 2.11 opens the copy of its wheel by path as well; symbols are looked up in the preloaded one first.
    return f"; mapped besides, bound by nobody: {', '.join(others)}" if others else ""


_BUILD = "it works through PTX, if at all; `nccl.mode: source` builds one for this GPU"
_PRELOAD = "start with the env file: `source single-node.env` sets LD_PRELOAD, which alone decides"


def _in_words(number: int) -> str:
    """22809 -> 2.28.9 (NCCL's NCCL_VERSION macro since 2.9)."""
    return f"{number // 10000}.{number % 10000 // 100}.{number % 100}"


def _address(node: Node, on: Reader, process: InEnvironment) -> Finding:
    if stop := _not_here(node, on):
        return stop
    if node.partial:
        return skipped("vLLM cannot be imported in a rehearsal without --full")
    answer = process.answer
    if "error" in answer or not answer.get("address"):
        return failed(answer.get("error", "vLLM's get_ip() gave no answer"), "run `sparkinstall all`")
    if answer["address"] != answer["wanted_address"]:
        return failed(answer["address"], "set VLLM_HOST_IP through the env file", answer["wanted_address"])
    return passed(answer["address"], answer["wanted_address"])


# Where DeltaMessage has lived since vLLM 0.10, newest first.
_PROTOCOLS = (
    "vllm/entrypoints/generate/base/protocol.py",
    "vllm/entrypoints/openai/engine/protocol.py",
    "vllm/entrypoints/openai/protocol.py",
)


def reasoning_fields(node: Node, on: Reader) -> Finding:
    """Fix 8: the names of the field in which this vLLM streams its thinking, read from its own class."""
    if site_packages(node, on) is None:
        return failed("there is no environment", "run `sparkinstall all`")
    if found := reasoning_names(node, on):
        return passed("delta." + " and delta.".join(found))
    return failed(
        "vLLM's DeltaMessage has no field for reasoning",
        "report it: this vLLM is newer than sparkinstall knows",
    )


def reasoning_names(node: Node, on: Reader) -> list[str]:
    """The fields of a delta that carry thinking; none where no vLLM is installed that has them."""
    site = site_packages(node, on)
    for path in _PROTOCOLS:
        names = delta_fields(on.read(f"{site}/{path}") or b"")
        if found := [name for name in names if name.startswith("reasoning")]:
            return found
    return []


def delta_fields(source: bytes) -> list[str]:
    """The annotated fields of `class DeltaMessage` in a module's source; none where it has no such class."""
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError):
        return []
    classes = [each for each in body if isinstance(each, ast.ClassDef) and each.name == "DeltaMessage"]
    fields = [field for each in classes for field in each.body if isinstance(field, ast.AnnAssign)]
    return [field.target.id for field in fields if isinstance(field.target, ast.Name)]
