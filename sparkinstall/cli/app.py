"""The verbs, bound to their files. Each imports what it needs when it is called."""

from typing import NoReturn

import typer

from sparkinstall.cli import all as all_verb
from sparkinstall.cli import cluster, multi_node, node_side, plan, run, settings, status, uninstall, verify

app = typer.Typer(
    help="From a fresh NVIDIA DGX Spark to a native, mended and proven vLLM, and back.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit codes: 0 good, 1 failed, 2 usage, 3 drift, 4 preflight, 5 some nodes failed, 130 interrupted "
    "(docs/exit-codes.md).",
)


def _version(asked: bool) -> None:
    if asked:
        from sparkinstall import __version__

        print(f"sparkinstall {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    del version


def main() -> None:
    """Run the command line; with `--json` also what typer itself refuses comes as one object."""
    import sys

    if "--json" not in sys.argv:
        app(prog_name="sparkinstall")
    try:
        sys.exit(app(prog_name="sparkinstall", standalone_mode=False))
    except Exception as error:
        # typer's own exceptions have moved between packages; what they have in common is this.
        if not hasattr(error, "format_message"):
            raise
        _tell_usage(error.format_message())


def _tell_usage(what: str) -> NoReturn:
    import sys

    from sparkinstall.cli.envelope import envelope
    from sparkinstall.errors import BadUsage, Exit

    verb = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    print(envelope(verb, Exit.USAGE, {}, [BadUsage(what, mend="`sparkinstall --help` lists verbs and options")]))
    sys.exit(int(Exit.USAGE))


app.command("all")(all_verb.all_)
app.command("multi-node")(multi_node.multi_node)
app.command("cluster")(cluster.cluster)
app.command("plan")(plan.plan)
app.command("verify")(verify.verify)
app.command("uninstall")(uninstall.uninstall)
app.command("status")(status.status)
app.command("run")(run.run)
app.add_typer(settings.app, name="settings")
app.add_typer(node_side.app, name="node", hidden=True)
