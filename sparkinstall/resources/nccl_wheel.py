"""Refuse an NCCL that hangs between nodes: that of an aarch64 wheel before 2.29.3."""

import re
from typing import ClassVar

from msgspec import Struct

from sparkinstall.node import Node
from sparkinstall.resources import Conflict, Ok, State, Unknown
from sparkinstall.resources.venv import lock_of
from sparkinstall.system import Reader, System

_WHEEL = re.compile(r"nvidia-nccl-cu\d+")
# NVIDIA/nccl #2353: 2.28.9 and 2.29.2 were compiled by gcc < 10, whose weak compare-and-swap can lose a slot on Arm.
_FIXED = (2, 29, 3)


class NcclOfWheel(Struct, frozen=True):
    """The NCCL that comes with torch can connect nodes; only for several nodes with `nccl.mode: wheel`."""

    key: ClassVar[str] = "nccl-of-wheel"
    node: Node

    def check(self, on: Reader) -> State:
        node = self.node
        # The shipped versions are known before the hashes are.
        pins = node.wheels.locked() if node.wheels.lock else lock_of(node, on)
        if pins is None:
            return Unknown("environment")
        version = next((pin.version for pin in pins if _WHEEL.fullmatch(pin.name)), "")
        if not version or node.platform != "aarch64" or tuple(map(int, re.findall(r"\d+", version))) >= _FIXED:
            return Ok(version)
        fixed = ".".join(map(str, _FIXED))
        return Conflict(
            f"NCCL {version}, which comes with torch in stack {node.stack.name}, hangs on several nodes: this aarch64 "
            "wheel was compiled by gcc 9 or older, and its ranks wait for each other for ever, busy at about 20 W and "
            "without an error (NVIDIA/nccl #2353)",
            f"build NCCL (`--set nccl.mode=source`), or choose a stack that comes with NCCL {fixed} or newer",
        )

    def apply(self, on: System) -> None:
        """Nothing: the engine applies neither a Conflict nor what is Ok; with `--force` there is nothing to redo."""
