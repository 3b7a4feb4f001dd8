"""The firmware updates that fwupd has for this machine and that are not installed."""

import msgspec
from msgspec import Struct

from sparkinstall.facts.machine import printable
from sparkinstall.system import Reader

# Without the two checks, fwupdmgr may ask on a terminal whether to send a report or to refresh its list.
_QUERY = ("fwupdmgr", "get-updates", "--json", "--no-unreported-check", "--no-metadata-check")
# The first question starts the daemon, which looks at all devices.
_TIMEOUT = 20.0


class Release(Struct, frozen=True, rename="pascal"):
    version: str = ""


class Device(Struct, frozen=True, rename="pascal"):
    """A device with an update; `releases` newest first. Its serial number is not read."""

    name: str = ""
    version: str = ""
    releases: tuple[Release, ...] = ()

    @property
    def words(self) -> str:
        newest = self.releases[0].version if self.releases else "another version"
        return printable(f"{self.name or 'a device'} {self.version or 'unknown'} -> {newest}")


class _Error(Struct, frozen=True, rename="pascal"):
    message: str = ""


class _Reply(Struct, frozen=True, rename="pascal"):
    """As fwupdmgr prints it (src/fu-util.c, fu_util_get_updates_as_json)."""

    devices: tuple[Device, ...] | None = None
    error: _Error = _Error()


def pending(on: Reader) -> tuple[Device, ...] | str:
    """Return the devices with an update, or why they are unknown."""
    answer = on.ask(*_QUERY, timeout=_TIMEOUT)
    if answer.code == 127:
        return "fwupdmgr is not installed"
    try:
        reply = msgspec.json.decode(answer.out, type=_Reply)
    except msgspec.DecodeError:
        return printable(answer.last_line) or "fwupdmgr does not answer"
    if reply.devices is None:
        return printable(reply.error.message) or "fwupdmgr does not answer"
    return reply.devices
