"""Properties and journal of a systemd unit."""

from sparkinstall.system import Reader


def show(on: Reader, unit: str, *properties: str) -> dict[str, str]:
    """Return the properties of a unit; "" for unknown ones."""
    answer = on.ask("systemctl", "show", unit, f"--property={','.join(properties)}")
    found = dict(line.split("=", 1) for line in answer.out.splitlines() if "=" in line)
    return {each: found.get(each, "") for each in properties}


def journal(on: Reader, *which: str, timeout: float = 30) -> str:
    """Return journalctl's output for the entries that `which` selects, or "".

    Reads as root if sudo needs no password, else what this user may read: members of `adm` may read all.
    """
    command = ("journalctl", *which, "-q", "--no-pager")
    answer = on.ask(*command, timeout=timeout, root=True)
    return answer.out if answer.ok else on.ask(*command, timeout=timeout).out
