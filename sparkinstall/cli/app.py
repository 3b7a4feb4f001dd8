"""The verbs, bound to their files. Each imports what it needs when it is called."""

from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

import typer

# Each verb's file, and its function there; the order is that of the help.
_VERBS = {
    "all": ("all", "all_"),
    "multi-node": ("multi_node", "multi_node"),
    "cluster": ("cluster", "cluster"),
    "plan": ("plan", "plan"),
    "verify": ("verify", "verify"),
    "doctor": ("doctor", "doctor"),
    "diagnose": ("diagnose", "diagnose"),
    "support-bundle": ("support_bundle", "support_bundle"),
    "uninstall": ("uninstall", "uninstall"),
    "status": ("status", "status"),
    "run": ("run", "run"),
}


def program(verb: str = "") -> typer.Typer:
    """The whole command line; for a `verb` that there is, that one alone: it need not wait for the others."""
    app = typer.Typer(
        help="Set up a native, patched and verified vLLM on a DGX Spark, and undo it.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
        epilog="Exit codes: 0 good, 1 failed, 2 usage, 3 drift, 4 preflight, 5 some nodes failed, 130 interrupted "
        "(docs/exit-codes.md).",
    )
    app.callback()(_root)
    for name in [verb] if verb in _VERBS else _VERBS:
        file, function = _VERBS[name]
        app.command(name)(getattr(import_module(f"sparkinstall.cli.{file}"), function))
    if verb not in _VERBS:
        from sparkinstall.cli import node, settings

        app.add_typer(settings.app, name="settings")
        app.add_typer(node.app, name="node", hidden=True)
    return app


def _version(asked: bool) -> None:
    if asked:
        from sparkinstall import __version__

        print(f"sparkinstall {__version__}")
        raise typer.Exit


def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    del version


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line (None: this process's own); with `--json` usage errors are one JSON object too."""
    import os
    import sys

    words = list(sys.argv[1:] if argv is None else argv)
    completing = "_SPARKINSTALL_COMPLETE" in os.environ
    app = program("" if completing else "".join(words[:1]))
    if "--json" not in words:
        app(words, prog_name="sparkinstall", obj=main)
    try:
        sys.exit(app(words, prog_name="sparkinstall", standalone_mode=False, obj=main))
    except Exception as error:
        # typer's own exceptions have moved between packages; what they have in common is this.
        if not hasattr(error, "format_message"):
            raise
        _tell_usage(words, error.format_message())


def _tell_usage(words: Sequence[str], what: str) -> NoReturn:
    import sys

    from sparkinstall.cli.json_output import envelope
    from sparkinstall.errors import BadUsage, Exit

    verb = next((word for word in words if not word.startswith("-")), "")
    print(envelope(verb, Exit.USAGE, {}, [BadUsage(what, hint="`sparkinstall --help` lists verbs and options")]))
    sys.exit(int(Exit.USAGE))
