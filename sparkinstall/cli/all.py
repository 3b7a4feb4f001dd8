"""`sparkinstall all`: from whatever state the node is in to the desired one, verified."""

from msgspec.structs import replace

from sparkinstall.cli import options
from sparkinstall.cli.install import install
from sparkinstall.cli.run_command import NODE, CommandResult, Output, verb
from sparkinstall.core.converge import InstallOptions
from sparkinstall.core.session import Target


@verb("all", *NODE)
def all_(
    target: Target,
    output: Output,
    only: options.Only = None,
    skip: options.Skip = None,
    ignore: options.Ignore = None,
    keep_old: options.KeepOld = None,
    bundle: options.Bundle = None,
    yes: options.Yes = False,
) -> CommandResult:
    """Set up this node: install, patch, verify. A second run changes nothing."""
    if keep_old is not None:
        target = replace(target, settings=(*target.settings, f"environment.keep_old={str(keep_old).lower()}"))
    target = replace(target, bundle=bundle)
    return install(target, output, InstallOptions(tuple(only or ()), tuple(skip or ()), tuple(ignore or ())), yes)
