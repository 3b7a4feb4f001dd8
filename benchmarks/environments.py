"""The environments to compare: sparkinstall as a user installs it, and other tools at pinned versions."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
PYINFRA, ANSIBLE = "3.10.0", "2.21.5"
_WANTED = {"pyinfra": f"pyinfra=={PYINFRA}", "ansible": f"ansible-core=={ANSIBLE}"}


@dataclass(frozen=True)
class Environment:
    """A venv below the cache folder."""

    folder: Path

    @property
    def python(self) -> str:
        return self.program("python")

    def program(self, name: str) -> str:
        return str(self.folder / "bin" / name)

    def version_of(self, package: str) -> str:
        ask = f"import importlib.metadata as m; print(m.version({package!r}))"
        return subprocess.run([self.python, "-c", ask], check=True, capture_output=True, text=True).stdout.strip()


def cache() -> Path:
    """The folder of the benchmarks' environments and rehearsals."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sparkinstall" / "bench"


def plain_environ(**more: str) -> dict[str, str]:
    """This process's variables without those that would slow only some of the tools, and `more`."""
    # Without bytecode each start compiles every module again, which no user of the tools has.
    left_out = ("PYTHON", "VIRTUAL_ENV", "SPARKINSTALL_", "ANSIBLE_", "PYINFRA_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    # All of them use the interpreter that runs the benchmarks.
    return kept | {"PATH": f"{sys.base_prefix}/bin:{kept['PATH']}"} | more


def peer(name: str) -> Environment:
    """pyinfra or ansible, installed once."""
    made = Environment(cache() / f"{name}-{_WANTED[name].rpartition('=')[2]}")
    if not (made.folder / "complete").exists():
        _make(made)
        _fill(made, _WANTED[name])
        (made.folder / "complete").touch()
    return made


def sparkinstall() -> Environment:
    """This checkout as install.sh installs it: its locked requirements, then the package, from scratch."""
    made = Environment(cache() / "sparkinstall")
    _make(made)
    _fill(made, "--require-hashes", "-r", str(CHECKOUT / "requirements.lock"))
    _fill(made, "--no-deps", "--no-build-isolation", "--reinstall", str(CHECKOUT))
    return made


def _make(made: Environment) -> None:
    made.folder.parent.mkdir(parents=True, exist_ok=True)
    _uv("venv", "--clear", "--python", sys.executable, str(made.folder))


def _fill(made: Environment, *what: str) -> None:
    # pip compiles what it installs, uv only with this option; every environment gets the result of pip.
    _uv("pip", "install", "--compile-bytecode", "--python", made.python, *what)


def _uv(*arguments: str) -> None:
    from uv import find_uv_bin

    subprocess.run([find_uv_bin(), *arguments, "--quiet"], check=True, env=plain_environ())
