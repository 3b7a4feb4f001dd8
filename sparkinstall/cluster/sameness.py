"""What must be the same on every node before Ray starts: vLLM and NCCL talk to their own kind only."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from sparkinstall import elf
from sparkinstall.errors import Blocked
from sparkinstall.node import Node, nccl_library
from sparkinstall.resources.decisions import recorded
from sparkinstall.resources.transport import Transport
from sparkinstall.resources.venv import installed
from sparkinstall.system import Reader

PACKAGES = ("vllm", "torch", "ray", "triton", "transformers")
"""Those whose versions nodes must share."""
_DECIDES = ("version", "arch", "compiler", "source", "only_functions")
_IN_WORDS = {"python": "Python", "nccl": "NCCL", "vllm": "vLLM", "transport": "transport for NCCL"}
_VERSION = re.compile(rb"^version(?:_info)? *= *(\S+)", re.MULTILINE)


def versions(node: Node, on: Reader) -> dict[str, str]:
    """Name -> version of what is installed; what is not there yet is left out."""
    packages = installed(node, on)
    found = {name: packages[name] for name in PACKAGES if name in packages}
    python = _VERSION.search(on.read(f"{node.venv}/pyvenv.cfg") or b"")
    if python:
        found["python"] = python[1].decode(errors="replace")
    nccl, transport = _nccl(node, on), Transport(node).talks_over(on) if node.several else ""
    return {**found, **({"nccl": nccl} if nccl else {}), **({"transport": transport} if transport else {})}


def _nccl(node: Node, on: Reader) -> str | None:
    if node.config.nccl.mode == "source":
        # Not the build-id: nvcc writes names of temporary files into what it makes, so two builds of one recipe differ.
        recipe = recorded(on, f"{node.nccl_folder}/build.json").get("recipe")
        return " ".join(str(recipe.get(name)) for name in _DECIDES) if isinstance(recipe, dict) else None
    path = nccl_library(node, on)
    real = Path(on.real(path)) if path else None
    return elf.build_id(real) if real is not None and real.is_file() else None


def token_digest(node: Node, on: Reader) -> str | None:
    """Tells two tokens apart without telling what they are; the token is random and long."""
    token = on.read(node.ray_token)
    return hashlib.sha256(token.strip()).hexdigest()[:16] if token else None


def require_same(nodes: Sequence[tuple[str, Mapping[str, str]]]) -> None:
    """Compare every node with the first one.

    Raises:
        Blocked: two nodes differ; it names both, and all that differs between them.
    """
    (first, wanted), *others = nodes
    for host, found in others:
        different = [name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name)]
        if different:
            said = (f"{_IN_WORDS.get(n, n)}: {_of(wanted, n)} on {first}, {_of(found, n)} on {host}" for n in different)
            raise Blocked(
                f"{first} and {host} have not the same {', '.join(_IN_WORDS.get(n, n) for n in different)}",
                cause="; ".join(said),
                hint=f"nothing was started. {_hint(different, first, host)}",
            )


def _hint(different: Sequence[str], first: str, host: str) -> str:
    if list(different) == ["transport"]:
        return (
            "RoCE on one and sockets on the other do not find each other: `sparkinstall plan` there says why it has no "
            "RoCE; or take sockets on all: `--set network.transport=socket`"
        )
    return (
        "Give both the same: the same stack on every node, and "
        f"`sparkinstall run environment nccl --force` on the one that is wrong ({first} or {host})"
    )


def _of(found: Mapping[str, str], name: str) -> str:
    return found.get(name, "none")[:80]
