"""sparkinstall, killed at a chosen moment: `python -m tests.support.dying_run VERB ...`.

DYING_AT is the moment: `before:9` and `after:9` the ninth line of the journal (`torn:9`: with half of it written,
`stop:9`: only stopped, after it), or `touch:7`: the seventh change of the file system by the process itself, as
Python's audit hooks see it. The first lines, about the folders of the state, appear at once. With DYING_COUNT the
process is not killed, and writes the number of its changes to that file.
"""

import json
import os
import signal
import sys

_TOUCHES = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.symlink", "os.chmod", "os.utime", "shutil.rmtree"}
_seen = 0


def _die_at_line(when: str, number: int) -> None:
    from sparkinstall.journal.journal import Journal

    append = Journal._append

    def counted(self: Journal, line: bytes) -> None:
        at = json.loads(line)["n"]
        if at == number and when == "torn":
            with open(self.path, "ab") as out:
                out.write(line[: len(line) // 2])
        if at == number and when in ("before", "torn"):
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, line)
        if at == number:
            os.kill(os.getpid(), signal.SIGSTOP if when == "stop" else signal.SIGKILL)

    Journal._append = counted  # type: ignore[method-assign]


def _die_at_touch(number: int) -> None:
    def hook(event: str, args: tuple[object, ...]) -> None:
        global _seen
        writing = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if event in _TOUCHES or writing:
            _seen += 1
            if _seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def main() -> None:
    """Run sparkinstall, and kill it at the moment that the environment names."""
    when, _, number = os.environ.get("DYING_AT", "touch:0").partition(":")
    from sparkinstall.__main__ import main as run

    if when == "touch":
        _die_at_touch(int(number))
    else:
        _die_at_line(when, int(number))
    try:
        run()
    finally:
        if counting := os.environ.get("DYING_COUNT"):
            with open(counting, "w") as out:
                out.write(str(_seen))


if __name__ == "__main__":
    main()
