"""`sparkinstall run STEP...`: single steps, by name."""

from typing import Annotated

import typer

from sparkinstall.cli import options
from sparkinstall.cli.install import Choice, install
from sparkinstall.cli.run_command import answer
from sparkinstall.core.session import Target


def run(
    steps: Annotated[
        list[str], typer.Argument(metavar="STEP...", help="Steps by name: `sparkinstall plan` lists them.")
    ],
    fresh: Annotated[bool, typer.Option("--force", help="Reinstall even if it is up to date.")] = False,
    root: options.Root = None,
    config: options.ConfigFile = None,
    stack: options.Stack = None,
    set_: options.Set = None,
    platform: options.Platform = None,
    full: options.Full = None,
    ignore: options.Ignore = None,
    yes: options.Yes = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Do these steps only, not those that they need."""
    asked = Target(root, config, stack, tuple(set_ or ()), platform, full, verbose)
    choice = Choice(tuple(steps), (), tuple(ignore or ()), yes, json, fresh, "run")
    answer("run", lambda: install(asked, choice), root=root, json=json, verbose=verbose)
