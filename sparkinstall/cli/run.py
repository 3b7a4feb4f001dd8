"""`sparkinstall run STEP...`: run single steps."""

from typing import Annotated

import typer
from msgspec.structs import replace

from sparkinstall.cli import options
from sparkinstall.cli.install import install
from sparkinstall.cli.run_command import NODE, CommandResult, Output, verb
from sparkinstall.core.converge import InstallOptions
from sparkinstall.core.session import Target


@verb("run", *NODE)
def run(
    target: Target,
    output: Output,
    steps: Annotated[
        list[str], typer.Argument(metavar="STEP...", help="Steps by name: `sparkinstall plan` lists them.")
    ],
    force: Annotated[bool, typer.Option("--force", help="Reinstall even if it is up to date.")] = False,
    ignore: options.Ignore = None,
    bundle: options.Bundle = None,
    yes: options.Yes = False,
) -> CommandResult:
    """Run only these steps, not those that they need."""
    target = replace(target, bundle=bundle)
    return install(target, output, InstallOptions(tuple(steps), (), tuple(ignore or ()), force, "run"), yes)
