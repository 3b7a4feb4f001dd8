"""`sparkinstall settings show`: every setting, its value and its origin."""

import json
from collections.abc import Mapping

import typer
from msgspec import Struct

from sparkinstall.cli.run_command import CommandResult, Output, verb
from sparkinstall.cli.text_output import console, headed
from sparkinstall.core.session import Setting, Target, open_session

app = typer.Typer(add_completion=False, help="Show every setting and its origin.", no_args_is_help=True)


class Settings(Struct, frozen=True):
    """Each setting by its dotted name."""

    settings: Mapping[str, Setting]


@app.callback()
def _group() -> None:
    """Show every setting and its origin."""


@app.command()
@verb("settings show", "root", "config", "stack", "set_", reads_only=True)
def show(target: Target, output: Output) -> CommandResult:
    """Print each setting with its value and origin."""
    del output
    settings = open_session(target).settings()
    return CommandResult(data=Settings(settings), show=lambda: _show(settings))


def _show(settings: Mapping[str, Setting]) -> None:
    table = headed("setting", "value", "from")
    for name, row in settings.items():
        value = row.value if isinstance(row.value, str) else json.dumps(row.value)
        table.add_row(name, value, row.source, style="dim" if row.source == "default" else "")
    console().print(table)
