"""Units as systemd knows them."""

from sparkinstall.system import Reader


def show(on: Reader, unit: str, *properties: str) -> dict[str, str]:
    """The properties of a unit; empty text for those that systemd does not tell."""
    answer = on.ask("systemctl", "show", unit, f"--property={','.join(properties)}")
    found = dict(line.split("=", 1) for line in answer.out.splitlines() if "=" in line)
    return {each: found.get(each, "") for each in properties}
