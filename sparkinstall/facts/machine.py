"""Identify the kind of machine from its files. The serial number is discarded."""

import os
import re
from collections.abc import Mapping
from hashlib import sha256

from sparkinstall.facts.sysfs import text_of
from sparkinstall.system import Reader

RELEASE_FILES = ("/etc/dgx-release", "/etc/fastos-release")
_SECRET_KEYS = re.compile(r"SERIAL|UUID|ASSET|MAC_ADDR", re.IGNORECASE)
_GB10_NAME = re.compile(r"\bGB10\b(?![0-9])")
_GB10_PCI = "10de:2e12"
_ASSIGNMENT = re.compile(r"\s*(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)")


def parse_release(content: bytes) -> dict[str, str]:
    """Parse `KEY=VALUE` lines, quoted or not; the last value of a repeated key wins. Never raises.

    Keys that identify the machine (the serial number) are left out, so that nothing can print them.
    """
    found: dict[str, str] = {}
    for line in content[:65536].decode(errors="replace").splitlines():
        match = _ASSIGNMENT.fullmatch(line)
        if match and not _SECRET_KEYS.search(match[1]):
            found[match[1]] = printable(_unquoted(match[2].strip()))
    return found


def _unquoted(value: str) -> str:
    quoted = len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'"
    return value[1:-1] if quoted else value


def printable(value: str) -> str:
    """Remove control characters: a release file is untrusted, and no escape sequence may reach a terminal."""
    return "".join(c if c.isprintable() else "?" for c in value)[:200]


def parse_meminfo(content: bytes) -> dict[str, int]:
    """Parse `/proc/meminfo`; values in kB."""
    rows = re.findall(r"^([A-Za-z0-9_()]+):\s+(\d+)", content.decode(errors="replace"), re.MULTILINE)
    return {name: int(value) for name, value in rows}


def free_blocks(on: Reader) -> dict[int, int]:
    """Return the free memory in KiB by the size of its blocks in KiB, from `/proc/buddyinfo`; {} if it is unknown.

    A block of order N has 2^N pages; the size of a page is 4 or 64 KiB on a Spark, depending on the kernel.
    """
    page = re.search(rb"^KernelPageSize:\s+(\d+) kB", on.read("/proc/self/smaps") or b"", re.MULTILINE)
    if page is None:
        return {}
    found: dict[int, int] = {}
    for zone in re.findall(r"^Node .*?zone +\w+ +(.*)$", text_of(on, "/proc/buddyinfo"), re.MULTILINE):
        for order, count in enumerate(map(int, zone.split())):
            size = int(page[1]) << order
            found[size] = found.get(size, 0) + count * size
    return found


def available_memory(on: Reader) -> int:
    """Bytes that programs can still take; 0 where the kernel does not tell."""
    return parse_meminfo(on.read("/proc/meminfo") or b"").get("MemAvailable", 0) << 10


def release(on: Reader) -> Mapping[str, str]:
    """Return the release file of DGX OS or of an OEM's image; {} if there is none."""
    merged: dict[str, str] = {}
    for path in reversed(RELEASE_FILES):
        merged |= parse_release(on.read(path) or b"")
    return merged


def os_version(on: Reader) -> str:
    """Return the release of DGX OS: "DGX OS 7.6.0 (factory image 7.2.3)"; "" on another system.

    An update over the air leaves the factory image's number as it is, and adds its own.
    """
    found = release(on)
    updated, factory = found.get("DGX_OTA_VERSION", ""), found.get("DGX_SWBUILD_VERSION", "")
    if not updated:
        return f"DGX OS {factory} (factory image)" if factory else ""
    return f"DGX OS {updated}" + (f" (factory image {factory})" if factory else "")


def boot_option(on: Reader, name: str) -> str:
    """Return the last of the kernel's options with this name, as `/proc/cmdline` has it; "" if there is none."""
    given = [word for word in text_of(on, "/proc/cmdline").split() if word.partition("=")[0] == name]
    return printable(given[-1]) if given else ""


def uefi_version(on: Reader) -> str:
    """Return the version of the firmware as DMI has it, such as 5.36_0ACUM027; "" if it is unknown."""
    return printable(text_of(on, "/sys/class/dmi/id/bios_version"))


def identity(on: Reader) -> str:
    """Return a digest that no other machine has; "" if this one has no id yet.

    The id alone would not do: machines that were installed from one image may share it, so the boot counts too.
    """
    own = (on.read("/etc/machine-id") or b"").strip()
    boot = on.read("/proc/sys/kernel/random/boot_id") or b""
    return sha256(own + boot).hexdigest() if own and own != b"uninitialized" else ""


def os_release(on: Reader) -> Mapping[str, str]:
    return parse_release(on.read("/etc/os-release") or on.read("/usr/lib/os-release") or b"")


def system_name(release: Mapping[str, str]) -> str:
    """Return the name of a distribution, such as `ubuntu 24.04`."""
    return f"{release.get('ID', 'unknown')} {release.get('VERSION_ID', '')}".strip()


def has_gb10(on: Reader) -> bool:
    """Return whether the PCI bus has a GB10 (10de:2e12), or the driver reports one."""
    for device in on.names("/sys/bus/pci/devices"):
        ids = [text_of(on, f"/sys/bus/pci/devices/{device}/{part}") for part in ("vendor", "device")]
        if ":".join(each.removeprefix("0x") for each in ids) == _GB10_PCI:
            return True
    gpus = "/proc/driver/nvidia/gpus"
    return any(_GB10_NAME.search(text_of(on, f"{gpus}/{name}/information")) for name in on.names(gpus))


def product(on: Reader) -> str:
    """Return the product name ("NVIDIA DGX Spark", "GX10", ...), or "" if unknown."""
    found = release(on)
    dmi = printable(text_of(on, "/sys/class/dmi/id/product_name"))
    names = (found.get("DGX_PRETTY_NAME"), found.get("DGX_PLATFORM"), found.get("NAME"), dmi)
    return next((name for name in names if name), "")


def is_gb10(name: str) -> bool:
    """Return whether a GPU's name is GB10 and not, for example, GB100."""
    return bool(_GB10_NAME.search(name))


def cores() -> int:
    return len(os.sched_getaffinity(0))
