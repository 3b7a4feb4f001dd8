"""Bytecode for modules that nodes can only read: else each process there compiles all that it imports."""

import platform
from pathlib import Path

from tests.lab import commands, rootfs

# The Python of the lab's nodes.
PYTHON = "3.13"
SECONDS = 1200


def compile_modules(tree: Path, place: str) -> None:
    """Compile the modules of `tree`, which nodes see at `place`, with the Python of the nodes.

    What is no module in spite of its name, such as a template, stays as it is.
    """
    options = ("-qq", "-s", str(tree), "-p", place)
    commands.run(*_python(), "-m", "compileall", *options, str(tree), timeout=SECONDS, check=False)
    assert any(tree.rglob(f"*.cpython-{PYTHON.replace('.', '')}.pyc")), f"no module of {tree} was compiled"


def _python() -> tuple[str, ...]:
    """The nodes' Python as a command of this machine, without its settings (the tests keep bytecode apart)."""
    usr = rootfs.trixie() / "usr"
    (loader,) = usr.glob("lib*/ld-linux-*.so.[0-9]")
    libraries = ("--library-path", f"{usr}/lib/{platform.machine()}-linux-gnu")
    return "env", "-i", f"PYTHONHOME={usr}", str(loader), *libraries, f"{usr}/bin/python{PYTHON}"
