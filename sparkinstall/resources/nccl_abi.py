"""Check that the preloaded NCCL has every symbol that torch needs from it."""

from pathlib import Path
from typing import ClassVar

from msgspec import Struct

from sparkinstall import elf
from sparkinstall.errors import Blocked
from sparkinstall.facts.decisions import SymbolCheck, as_text, recorded
from sparkinstall.node import Node, nccl_library, site_packages
from sparkinstall.resources import Drift, Ok, State, Unknown
from sparkinstall.system import Reader, System

_SYMBOLS = "nccl"


class NcclFitsTorch(Struct, frozen=True):
    """The node's NCCL has torch's symbols; otherwise `import torch` would fail with the env file."""

    key: ClassVar[str] = "nccl-fits-torch"
    node: Node

    def node_only(self, on: Reader) -> str:
        if self.node.partial:
            return "comparing NCCL's symbols with torch's (torch is not installed here without --full)"
        return "" if self._pair(on)[0] else "comparing NCCL's symbols with torch's (no NCCL was built here)"

    def check(self, on: Reader) -> State:
        library, torch = self._pair(on)
        if torch is None or library is None:
            return Unknown("environment" if torch is None else "nccl")
        about = _about(library, torch)
        known = recorded(on, self.node.nccl_abi_decision, SymbolCheck)
        if known and known.about == about:
            return Ok(f"{known.symbols} symbols")
        return Drift("compare NCCL's symbols with those that torch needs", "", as_text(about))

    def _pair(self, on: Reader) -> tuple[Path | None, Path | None]:
        site, library = site_packages(self.node, on), nccl_library(self.node, on)
        torch = Path(on.real(f"{site}/torch/lib/libtorch_cuda.so"))
        nccl = Path(on.real(library)) if library else None
        return (nccl if nccl and nccl.exists() else None), (torch if site and torch.exists() else None)

    def apply(self, on: System) -> None:
        library, torch = self._pair(on)
        assert library and torch, "the engine applies no Unknown"
        needed = elf.undefined_symbols(torch, _SYMBOLS)
        missing = sorted(needed - elf.defined_symbols(library, _SYMBOLS))
        if missing:
            raise Blocked(
                f"NCCL {self.node.nccl_version} lacks symbols that torch needs: {', '.join(missing[:4])}",
                cause=f"torch was built with a newer NCCL; loading {library} would break `import torch`",
                hint=f"use the NCCL release of the stack ({self.node.stack.nccl.version}), or `nccl.mode: wheel`",
            )
        decision = SymbolCheck(_about(library, torch), len(needed))
        on.write(self.node.nccl_abi_decision, as_text(decision).encode())


def _about(library: Path, torch: Path) -> dict[str, str]:
    """Return the compared libraries. Raises NotALibrary if one is damaged."""
    return {
        "nccl": elf.build_id(library) or str(library.stat().st_size),
        "torch": elf.build_id(torch) or str(torch.stat().st_size),
    }
