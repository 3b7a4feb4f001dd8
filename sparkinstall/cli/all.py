"""`sparkinstall all`: from whatever state the node is in to the desired one, verified."""

from sparkinstall.cli import options
from sparkinstall.cli.install import Choice, install
from sparkinstall.cli.run_command import answer
from sparkinstall.core.session import Target


def all_(
    root: options.Root = None,
    config: options.ConfigFile = None,
    stack: options.Stack = None,
    set_: options.Set = None,
    platform: options.Platform = None,
    full: options.Full = None,
    only: options.Only = None,
    skip: options.Skip = None,
    ignore: options.Ignore = None,
    yes: options.Yes = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Set up this node: install, patch, verify. A second run changes nothing."""
    asked = Target(root, config, stack, tuple(set_ or ()), platform, full, verbose)
    choice = Choice(tuple(only or ()), tuple(skip or ()), tuple(ignore or ()), yes, json)
    answer("all", lambda: install(asked, choice), root=root, json=json, verbose=verbose)
