"""`sparkinstall`, and `python -m sparkinstall`."""

import sys

from sparkinstall import __version__


def main() -> None:
    """Run the command line."""
    if sys.argv[1:] == ["--version"]:
        # Before typer is imported: scripts ask for this often.
        print(f"sparkinstall {__version__}")
        return
    from sparkinstall.cli import app

    app.main()


if __name__ == "__main__":
    main()
