"""`sparkinstall settings show`: every setting, its value, and where that came from."""

import typer

from sparkinstall.cli import options
from sparkinstall.cli.options import Asked
from sparkinstall.cli.verb import Answer, answer

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
    asked = Asked(root, config, stack, tuple(set_ or ()), verbose=verbose)
    answer("settings show", lambda: _show(asked), root=root, json=json, verbose=verbose)


def _show(asked: Asked) -> Answer:
    from functools import reduce
    from json import dumps as to_json

    from sparkinstall import config as configuration
    from sparkinstall.cli.session import open_session

    session = open_session(asked)
    rows = {
        setting.name: {
            "value": reduce(getattr, setting.name.split("."), session.node.config),
            "source": session.sources[setting.name],
        }
        for setting in configuration.settings()
    }

    def show_rows() -> None:
        from rich.table import Table

        from sparkinstall.cli.render import console

        table = Table(box=None, pad_edge=False, header_style="dim")
        for heading in ("setting", "value", "from"):
            table.add_column(heading)
        for name, row in rows.items():
            value = row["value"] if isinstance(row["value"], str) else to_json(row["value"])
            style = "dim" if row["source"] == "default" else ""
            table.add_row(name, value, str(row["source"]), style=style)
        console().print(table)

    return Answer(data={"settings": rows}, show=show_rows)
