"""The verbs, bound to their files. Each imports what it needs when it is called."""

import typer

from sparkinstall.cli import all as all_verb
from sparkinstall.cli import plan, run, settings, status, uninstall, verify

app = typer.Typer(
    help="From a fresh NVIDIA DGX Spark to a native, mended and proven vLLM, and back.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit codes: 0 good, 1 failed, 2 usage, 3 drift, 4 preflight, 130 interrupted (docs/exit-codes.md).",
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


app.command("all")(all_verb.all_)
app.command("plan")(plan.plan)
app.command("verify")(verify.verify)
app.command("uninstall")(uninstall.uninstall)
app.command("status")(status.status)
app.command("run")(run.run)
app.add_typer(settings.app, name="settings")
