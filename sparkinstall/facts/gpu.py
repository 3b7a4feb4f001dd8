"""The GPU as nvidia-smi shows it."""

from msgspec import Struct

from sparkinstall.facts.machine import printable
from sparkinstall.system import Reader, Result

QUERY = (
    "nvidia-smi",
    "--query-gpu=name,compute_cap,driver_version,utilization.gpu,clocks.sm,power.draw",
    "--format=csv,noheader,nounits",
)
"""The program that `understood` reads the answer of."""


DRIVER_FILE = "/proc/driver/nvidia/version"
"""What the loaded driver says of itself."""


class Gpu(Struct, frozen=True):
    """The first GPU. `capability` such as 12.1; `busy` in percent, `mhz` of its clock, `watts`: None where not told."""

    name: str
    capability: str
    driver: str
    busy: float | None = None
    mhz: float | None = None
    watts: float | None = None


def first_gpu(on: Reader) -> Gpu | None:
    """The first GPU, or None where nvidia-smi is missing or answers with an error."""
    found = gpu_or_complaint(on)
    return found if isinstance(found, Gpu) else None


def gpu_or_complaint(on: Reader) -> Gpu | str:
    """The first GPU, or the first line that nvidia-smi says in its place; empty where it says nothing or is missing."""
    if on.rehearsal:
        return ""
    answer = on.ask(*QUERY)
    if found := understood(answer):
        return found
    said = [line.strip() for line in (answer.out + answer.err).splitlines() if line.strip()]
    # What is said of a program that is not there is the shell's, not its own.
    return printable(said[0]) if said and answer.code != 127 else ""


def understood(answer: Result) -> Gpu | None:
    """The first GPU in an answer to `QUERY`."""
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.out.splitlines()]
    if not answer.ok or not rows or len(rows[0]) != 6:
        return None
    name, capability, driver, *numbers = rows[0]
    return Gpu(name, capability, driver, *map(_number, numbers))


def _number(cell: str) -> float | None:
    """nvidia-smi writes `[N/A]` for what it cannot tell."""
    try:
        return float(cell)
    except ValueError:
        return None
