"""A network namespace of this user's own, with the real `ip`."""

import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sparkinstall.system import Result
from sparkinstall.system.local import LocalSystem


class Namespace(LocalSystem):
    """A node below a folder, whose `ip` and `sh` run in the namespace, as root of it."""

    def __init__(self, root: Path) -> None:
        super().__init__(str(root))

    def __enter__(self) -> Self:
        # It ends with its input, even if this process is killed.
        self._holder = subprocess.Popen(
            ["unshare", "--map-root-user", "--net", "sh", "-c", "echo ready; read -r _"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout and self._holder.stdout.readline() == "ready\n"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._holder.communicate("\n")

    @property
    def rehearsal(self) -> bool:
        return False

    def real(self, path: str) -> str:
        return self.root + path

    def read(self, path: str) -> bytes | None:
        # Another process of this namespace sees other values there.
        return self.ask("sh", "-c", f"cat {path}").out.encode() if path.startswith("/proc/sys/") else super().read(path)

    def ask(
        self, *argv: str, timeout: float = 30, env: Mapping[str, str] | None = None, root: bool = False, stdin: str = ""
    ) -> Result:
        del env, root, stdin
        if argv[0] not in ("ip", "sh"):
            return Result(argv, 127, "", "")
        inside = ("nsenter", "--target", str(self._holder.pid), "--user", "--net", "--preserve-credentials", *argv)
        done = subprocess.run(inside, capture_output=True, text=True, check=False, timeout=timeout)
        return Result(argv, done.returncode, done.stdout, done.stderr)

    def shell(self, *lines: str) -> None:
        """Run lines for sh in the namespace."""
        answer = self.ask("sh", "-ec", "\n".join(lines))
        assert answer.ok, (lines, answer.err)

    def try_run(self, *argv: str, **_: Any) -> Result:
        return self.ask(*argv)
