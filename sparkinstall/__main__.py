"""`sparkinstall`, and `python -m sparkinstall`."""

import atexit
import gc
import io
import os
import sys

from sparkinstall import __version__


def main() -> None:
    """Run the command line."""
    if sys.argv[1:] == ["--version"]:
        # Before typer is imported: scripts ask for this often.
        print(f"sparkinstall {__version__}")
        return
    _look_for_garbage_seldom()
    # Started with a stream closed (`2>&-`), what is said there goes nowhere.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a sign gets a question mark, not a crash.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    from sparkinstall.cli import app

    app.main()


def _look_for_garbage_seldom() -> None:
    # Of a run with nothing to do, a sixth went into looking through modules and classes, which are never garbage:
    # while they are imported, and once more when the interpreter ends.
    gc.set_threshold(50_000)
    atexit.register(gc.freeze)


if __name__ == "__main__":
    main()
