"""`sparkinstall`, and `python -m sparkinstall`."""

import os
import sys
from importlib import import_module

from sparkinstall import __version__

try:
    from sparkinstall.cli import edge
except KeyboardInterrupt:
    os.write(2, "✗ interrupted; nothing was changed\n".encode())
    os._exit(130)
except (OSError, MemoryError) as error:
    os.write(2, f"✗ sparkinstall cannot start: {str(error) or 'not enough memory'}\n".encode())
    os._exit(1)


def main() -> None:
    """Run the command line of this process."""
    if code := edge.run(_program, _problem_of):
        sys.exit(code)


def _program() -> None:
    if sys.argv[1:] == ["--version"]:
        # Before typer is imported: scripts call this often.
        print(f"sparkinstall {__version__}")
    else:
        import_module("sparkinstall.cli.app").main()


def _problem_of(error: BaseException) -> object:
    return import_module("sparkinstall.cli.run_command").problem_of(error)


if __name__ == "__main__":
    main()
