"""Options shared by the verbs."""

import math
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from sparkinstall.probes import LEVELS, Level
from sparkinstall.schema import require_known


def a_number(value: float) -> float:
    """Return the value of an option, unless it is NaN, which no limits of an option catch.

    Raises:
        BadParameter: it is.
    """
    if math.isnan(value):
        raise typer.BadParameter("nan is no number")
    return value


# An option below its heading in the help.
node = partial(typer.Option, rich_help_panel="Which node")
choice = partial(typer.Option, rich_help_panel="Which parts")
link = partial(typer.Option, rich_help_panel="The cluster")
output = partial(typer.Option, rich_help_panel="Output")

Root = Annotated[Path | None, node(help="Rehearse below this folder instead of setting up this machine.")]
ConfigFile = Annotated[Path | None, node("--config", help="The config file (YAML).", envvar="SPARKINSTALL_CONFIG")]
Stack = Annotated[str | None, node(help="The set of pins: a shipped name or a YAML file.")]
Set = Annotated[list[str] | None, node("--set", metavar="KEY=VALUE", help="Override one setting of the config file.")]
Platform = Annotated[
    str | None, node(help="Rehearsal or bundle: use the wheels of aarch64 (a bundle's default) or x86_64.")
]
Full = Annotated[bool | None, node("--full/--partial", help="Rehearsal: install all 9 GB, not only vLLM's wheel.")]

Only = Annotated[list[str] | None, choice(metavar="STEP", help="Run only this step (may repeat).")]
Skip = Annotated[list[str] | None, choice(metavar="STEP", help="Skip this step (may repeat).")]
Ignore = Annotated[list[str] | None, choice(metavar="CHECK", help="Ignore this check if it fails (may repeat).")]
Names = Annotated[list[str] | None, choice(metavar="NAME", help="Run only this step or probe (may repeat).")]
NotNames = Annotated[list[str] | None, choice(metavar="NAME", help="Skip this step or probe (may repeat).")]
Model = Annotated[str | None, link(metavar="MODEL", help="Serve this model as a service.")]
Serve = Annotated[
    str | None,
    choice(metavar="RECIPE|MODEL", help="Serve it when all is set up, and wait until it answers (docs/serving.md)."),
]
Order = Annotated[
    str | None, typer.Option("--order", hidden=True, help="What `cluster --serve` serves on all nodes, as JSON.")
]
HowFar = Annotated[
    str | None,
    choice(
        "--level",
        metavar="LEVEL",
        help="Highest level to run: static, node, gpu, link, cluster or serving; default: all.",
    ),
]
Measure = Annotated[bool, choice("--measure", help="Include probes that keep the GPU or the link busy.")]

KeepOld = Annotated[
    bool | None,
    choice("--keep-old/--no-keep-old", help="Keep the former environment after a switch to another stack."),
]

# Otherwise click refuses a file that this user may not read, without a hint.
bundle = partial(choice, readable=False)
Bundle = Annotated[
    Path | None, bundle(metavar="FILE", help="Install from this bundle, and download nothing (docs/offline.md).")
]

Yes = Annotated[bool, output("--yes", "-y", help="Do not ask for confirmation.")]
Json = Annotated[bool, output("--json", help="Print one JSON object on stdout (docs/json.md).")]
Verbose = Annotated[bool, output("--verbose", "-v", help="Show every line of every program.")]
Junit = Annotated[Path | None, output(metavar="FILE", help="Write a JUnit report for CI.")]
Strict = Annotated[bool, output("--strict", help="Count skipped as failed.")]


def known_level(name: str | None) -> Level | None:
    """Return the level with that name.

    Raises:
        BadUsage: there is none.
    """
    require_known([name] if name is not None else [], LEVELS, "level")
    return next((level for level in LEVELS if level == name), None)
