"""`sparkinstall all`: from whatever state the node is in to the desired one, verified."""

from msgspec.structs import replace

from sparkinstall.cli import app, options
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
    serve: options.Serve = None,
    order: options.Order = None,
    yes: options.Yes = False,
) -> CommandResult:
    """Set up this node: install, patch, verify. A second run changes nothing."""
    if keep_old is not None:
        target = replace(target, settings=(*target.settings, f"environment.keep_old={str(keep_old).lower()}"))
    target = replace(target, bundle=bundle)
    chosen = InstallOptions(tuple(only or ()), tuple(skip or ()), tuple(ignore or ()))
    if serve is not None:
        done: CommandResult = app.imported("serve:install_and_serve")(target, output, chosen, serve, yes)
        return done
    return install(ordered(target, order), output, chosen, yes)


def ordered(target: Target, order: str | None) -> Target:
    """Return the target that serves what `cluster --serve` has ordered, if it has."""
    found: Target = app.imported("serve:ordered")(target, order) if order else target
    return found
