"""`sparkinstall`, and `python -m sparkinstall`."""

import atexit
import gc
import io
import os
import sys
from importlib import import_module

from sparkinstall import __version__


def main() -> None:
    """Run the command line."""
    if sys.argv[1:] == ["--version"]:
        # Before typer is imported: scripts call this often.
        print(f"sparkinstall {__version__}")
        return
    # At its end Python searches modules and classes for garbage: a quarter of the CPU time if there is nothing to do.
    atexit.register(gc.freeze)
    # If started with a closed stream (`2>&-`), discard its output.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets a question mark, not a crash.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    import_module("sparkinstall.cli.app").main()


if __name__ == "__main__":
    main()
