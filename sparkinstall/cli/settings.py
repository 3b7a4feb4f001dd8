"""`sparkinstall settings show`: every setting, its value, and where that came from."""

from typing import TYPE_CHECKING, Any

import typer

from sparkinstall.cli import options
from sparkinstall.cli.run_command import Answer, answer
from sparkinstall.core.session import Target

if TYPE_CHECKING:
    from sparkinstall.core.session import Session

app = typer.Typer(help="Show every setting and where its value comes from.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Show every setting and where its value comes from."""


@app.command()
def show(
    root: options.Root = None,
    config: options.ConfigFile = None,
    stack: options.Stack = None,
    set_: options.Set = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Print each setting with its value and where it came from."""
    asked = Target(root, config, stack, tuple(set_ or ()), verbose=verbose)
    answer("settings show", lambda: _show(asked), root=root, json=json, verbose=verbose)


def rows(session: "Session") -> dict[str, dict[str, Any]]:
    """Each setting by its dotted name, with its value and where that came from."""
    from functools import reduce

    from sparkinstall import config as configuration

    return {
        setting.name: {
            "value": reduce(getattr, setting.name.split("."), session.node.config),
            "source": session.sources[setting.name],
        }
        for setting in configuration.settings()
    }


def _show(asked: Target) -> Answer:
    from json import dumps as to_json

    from sparkinstall.core.session import open_session

    settings = rows(open_session(asked))

    def show_rows() -> None:
        from rich.table import Table

        from sparkinstall.cli.text_output import console

        table = Table(box=None, pad_edge=False, header_style="dim")
        for heading in ("setting", "value", "from"):
            table.add_column(heading)
        for name, row in settings.items():
            value = row["value"] if isinstance(row["value"], str) else to_json(row["value"])
            style = "dim" if row["source"] == "default" else ""
            table.add_row(name, value, str(row["source"]), style=style)
        console().print(table)

    return Answer(data={"settings": settings}, show=show_rows)
