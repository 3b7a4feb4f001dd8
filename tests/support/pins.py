"""The versions of the shipped stacks, for what tests install: an index may have newer ones tomorrow."""

from pathlib import Path

from sparkinstall import stacks


def locks_with(name: str) -> dict[str, dict[str, str]]:
    """The pins of one lock for each version of the package `name`, by package."""
    found: dict[str, dict[str, str]] = {}
    for stack in stacks.names():
        for platform in stacks.load(stack).platforms.values():
            pins = {pin.name: pin.version for pin in platform.locked()} if platform.lock else {}
            if name in pins:
                found.setdefault(pins[name], pins)
    return found


def constraints(pins: dict[str, str], beside: str = "") -> str:
    """The lines of a file of constraints; `beside`: requirements that pin packages themselves."""
    taken = {line.partition("==")[0] for line in beside.splitlines()}
    return "".join(f"{name}=={version}\n" for name, version in sorted(pins.items()) if name not in taken)


def written(place: Path, lines: str) -> tuple[str, str]:
    """uv's option for constraints, with their file in the folder `place`."""
    file = place / "constraints.txt"
    file.write_text(lines)
    return "--constraint", str(file)
