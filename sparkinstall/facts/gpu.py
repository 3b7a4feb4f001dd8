"""The GPU as nvidia-smi reports it, and its driver."""

import re
from collections.abc import Iterable

from msgspec import Struct

from sparkinstall.facts.machine import printable
from sparkinstall.facts.sysfs import text_of
from sparkinstall.system import Reader, Result

QUERY = (
    "nvidia-smi",
    "--query-gpu=name,compute_cap,driver_version,utilization.gpu,clocks.sm,power.draw",
    "--format=csv,noheader,nounits",
)
"""The command whose output `understood` parses."""

LIVE_QUERY = (
    "nvidia-smi",
    "--query-gpu=utilization.gpu,clocks.sm,clocks.max.sm,power.draw,temperature.gpu",
    "--format=csv,noheader,nounits",
)
"""The command whose output `live` parses."""

DRIVER_FILE = "/proc/driver/nvidia/version"
"""The loaded driver's description of itself."""
_LOADED = re.compile(r"(?:Kernel Module|for \S+) +([0-9][0-9.]+)")


class Gpu(Struct, frozen=True):
    """The first GPU. `capability` such as 12.1; `busy` (percent), `mhz` (SM clock) and `watts` are None if unknown."""

    name: str
    capability: str
    driver: str
    busy: float | None = None
    mhz: float | None = None
    watts: float | None = None


class LiveGpu(Struct, frozen=True):
    """How busy the first GPU is: percent, SM clock and its highest in MHz, W, degrees C; None: it does not tell."""

    busy: float | None = None
    mhz: float | None = None
    max_mhz: float | None = None
    watts: float | None = None
    celsius: float | None = None


def live(on: Reader) -> LiveGpu | None:
    """Return how busy the first GPU is, or None if nvidia-smi is missing or fails."""
    if on.rehearsal:
        return None
    answer = on.ask(*LIVE_QUERY)
    rows = answer.out.splitlines()
    numbers = [_number(cell.strip()) for cell in rows[0].split(",")] if answer.ok and rows else []
    return LiveGpu(*numbers) if len(numbers) == len(LiveGpu.__struct_fields__) else None


def first_gpu(on: Reader) -> Gpu | None:
    """Return the first GPU, or None if nvidia-smi is missing or fails."""
    found = gpu_or_complaint(on)
    return found if isinstance(found, Gpu) else None


def gpu_or_complaint(on: Reader) -> Gpu | str:
    """Return the first GPU, or the first line of nvidia-smi's error; "" if it prints none or is missing."""
    if on.rehearsal:
        return ""
    answer = on.ask(*QUERY)
    if found := understood(answer):
        return found
    said = [line.strip() for line in (answer.out + answer.err).splitlines() if line.strip()]
    # "not found" is not a message of nvidia-smi.
    return printable(said[0]) if said and answer.code != 127 else ""


def loaded_driver(on: Reader) -> str:
    """Return the version of the driver that is loaded; "" if there is none."""
    found = _LOADED.search(text_of(on, DRIVER_FILE))
    return found[1] if found else ""


def installed_driver(on: Reader, libraries: Iterable[str]) -> str:
    """Return the version of the driver that is installed, from the first of these links that exists; "" if none does.

    A library's link, such as libnvidia-ml.so.1, names a file that ends in the version: libnvidia-ml.so.580.178.04.
    """
    entries = (on.entry(path) for path in libraries)
    target = next((entry.target for entry in entries if entry and entry.target), "")
    return target.rpartition(".so.")[2]


def understood(answer: Result) -> Gpu | None:
    """Return the first GPU in the result of `QUERY`."""
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.out.splitlines()]
    if not answer.ok or not rows or len(rows[0]) != 6:
        return None
    name, capability, driver, *numbers = rows[0]
    return Gpu(name, capability, driver, *map(_number, numbers))


def _number(cell: str) -> float | None:
    """Parse a number; nvidia-smi writes `[N/A]` for unknown ones."""
    try:
        return float(cell)
    except ValueError:
        return None
