"""`sparkinstall`, and `python -m sparkinstall`."""

import sys

from sparkinstall import __version__


def main() -> None:
    """Run the command line."""
    if sys.argv[1:] == ["--version"]:
        # Before typer is imported: scripts ask for this often.
        print(f"sparkinstall {__version__}")
        return
    from sparkinstall.cli.app import app

    app(prog_name="sparkinstall")


if __name__ == "__main__":
    main()
