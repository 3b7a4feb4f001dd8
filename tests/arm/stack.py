"""A shipped stack resolved for the emulated node's Python, and how that differs from what a Spark gets."""

from pathlib import Path

import yaml

from sparkinstall import stacks
from sparkinstall.stacks import Pin, Stack
from tests.lab import arm64
from tools.lock import lock_text

ARCH = "aarch64"


def write(name: str, folder: Path) -> Stack:
    """Write the stack and its lock for Debian's Python to `folder`; `tools/lock.py` resolves it.

    Raises StackError for a stack that names its wheels by address: they are for the stack's own Python.
    """
    shipped = stacks.load(name)
    if shipped.platforms[ARCH].wheels:
        raise stacks.StackError(f"{name} names wheels for Python {shipped.python} by address: choose another --stack")
    content = yaml.load(shipped.source.read_text(), yaml.BaseLoader)
    content |= {"name": f"{name}-python{arm64.PYTHON}", "python": arm64.PYTHON}
    lock = f"{content['name']}.{ARCH}.lock"
    content["platforms"] = {ARCH: {"lock": lock}}
    path = folder / f"{content['name']}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    stack = stacks.load(str(path))
    (folder / lock).write_text(lock_text(stack, stack.platforms[ARCH]))
    return stack


def differences(shipped: Stack, here: Stack) -> list[str]:
    """How the lock of the stack for this Python differs from the shipped one, in lines of text."""
    theirs, ours = _pins(shipped), _pins(here)
    same = [name for name in ours if name in theirs and ours[name].version == theirs[name].version]
    wheels = [name for name in same if set(ours[name].hashes) & set(theirs[name].hashes)]
    built = sorted(set(same) - set(wheels))
    lines = [f"{len(ours)} packages; {len(theirs)} in the shipped lock for Python {shipped.python}"]
    lines.append(f"{len(wheels)} of them are the same file as on a Spark, by sha256")
    lines.append(f"{len(built)} have the same version, built for Python {here.python}: {', '.join(built) or 'none'}")
    lines += [f"another version: {_named(theirs[name])} becomes {_named(ours[name])}"
              for name in sorted(ours) if name in theirs and name not in same]  # fmt: skip
    lines += [f"only for Python {here.python}: {_named(ours[name])}" for name in sorted(set(ours) - set(theirs))]
    return lines + [f"only on a Spark: {_named(theirs[name])}" for name in sorted(set(theirs) - set(ours))]


def _pins(stack: Stack) -> dict[str, Pin]:
    return {pin.name: pin for pin in stacks.parse_lock(stack.platforms[ARCH].lock_text())}


def _named(pin: Pin) -> str:
    return f"{pin.name} {pin.version}"
