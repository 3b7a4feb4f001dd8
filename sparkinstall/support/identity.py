"""Read what identifies this machine and its users, only in order to mask it."""

import os
import pwd
import re
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial

from sparkinstall import given, safe_yaml
from sparkinstall.errors import Problem
from sparkinstall.facts import machine
from sparkinstall.support.mask import Known
from sparkinstall.system import Reader

_SERIALS = ("product_serial", "board_serial", "chassis_serial", "product_uuid")
_SERIAL_LINE = re.compile(rb"(?im)^\s*(?:export\s+)?\w*(?:SERIAL|UUID|ASSET)\w*=[\"']?([^\s\"']+)")
_KEYFILES = "/etc/NetworkManager/system-connections"
_NETPLAN = ("/etc/netplan", "/run/netplan", "/lib/netplan")
_FIRST_PERSON, _LAST_PERSON = 1000, 60000
# Placeholders of boards without a serial number.
_NO_SERIAL = re.compile(r"(?i)(?:default|none|not|to be|system|0+$|n/a|unknown|empty|virtual)")


def known(on: Reader) -> Known:
    """Return the identifying names and ids of the node and of the machine that runs this, as far as readable."""
    return Known(
        hosts=_gathered(_own_hosts, lambda: _hosts(on)),
        users=_gathered(_own_users, lambda: _people(on)),
        homes=_gathered(_homes),
        serials=_gathered(lambda: _ids(on), lambda: _board(on)),
        networks=_gathered(lambda: _keyfiles(on), lambda: _netplan(on)),
    )


def _gathered(*sources: Callable[[], Iterable[str]]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for source in sources:
        try:
            found.update(dict.fromkeys(each for each in source() if each))
        except (Problem, OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            # Values with a recognizable shape are masked even without this source.
            continue
    return tuple(found)


def _own_hosts() -> Iterator[str]:
    name = socket.gethostname()
    yield from (name, name.split(".")[0])


def _hosts(on: Reader) -> Iterator[str]:
    name = _text(on, "/etc/hostname").strip()
    yield from (name, name.split(".")[0])
    for line in _text(on, "/etc/hosts").splitlines():
        for each in line.split("#")[0].split()[1:]:
            # ip6-localnet and the like are in every hosts file.
            if not each.startswith("ip6-"):
                yield from (each, each.split(".")[0])


def _own_users() -> Iterator[str]:
    yield from (os.environ.get(name, "") for name in ("USER", "LOGNAME", "SUDO_USER"))
    yield given.user()


def _people(on: Reader) -> Iterator[str]:
    for line in _text(on, "/etc/passwd").splitlines():
        fields = line.split(":")
        if len(fields) >= 7 and fields[2].isdigit() and _FIRST_PERSON <= int(fields[2]) < _LAST_PERSON:
            full_name = fields[4].split(",")[0].strip()
            yield from (fields[0], full_name if " " in full_name else "")


def _homes() -> Iterator[str]:
    yield os.environ.get("HOME", "")
    with suppress(KeyError):
        yield pwd.getpwuid(os.geteuid()).pw_dir


def _ids(on: Reader) -> Iterator[str]:
    yield _text(on, "/etc/machine-id").strip()
    for path in machine.RELEASE_FILES:
        yield from (each.decode(errors="replace") for each in _SERIAL_LINE.findall(on.read(path) or b""))


def _board(on: Reader) -> Iterator[str]:
    for name in _SERIALS:
        serial = _text(on, f"/sys/class/dmi/id/{name}").strip()
        yield "" if len(serial) < 5 or _NO_SERIAL.match(serial) else serial


def _keyfiles(on: Reader) -> Iterator[str]:
    for name in on.names(_KEYFILES):
        stem = name.removesuffix(".nmconnection")
        yield "" if stem.startswith(("Wired connection", "netplan-")) else stem


def _netplan(on: Reader) -> Iterator[str]:
    paths = [f"{folder}/{name}" for folder in _NETPLAN for name in on.names(folder) if name.endswith(".yaml")]
    for path in paths:
        yield from _gathered(partial(_access_points, on, path))


def _access_points(on: Reader, path: str) -> Iterator[str]:
    network = safe_yaml.load(on.read(path) or b"", only_text=True)["network"]
    for device in (network.get("wifis") or {}).values():
        points = device.get("access-points") if isinstance(device, dict) else None
        for name, point in (points or {}).items():
            yield from (name, (point or {}).get("networkmanager", {}).get("name", ""))


def _text(on: Reader, path: str) -> str:
    return (on.read(path) or b"").decode(errors="replace")
