"""Options shared by the verbs."""

from pathlib import Path
from typing import Annotated

import typer

from sparkinstall.core.catalogue import require_known
from sparkinstall.probes import LEVELS, Level

_NODE, _CHOICE, _OUTPUT = "Which node", "Which parts", "Output"
LINK = "The cluster"
"""Heading of the options for several nodes."""

Root = Annotated[
    Path | None,
    typer.Option(help="Rehearse below this folder instead of setting up this machine.", rich_help_panel=_NODE),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="The config file (YAML).", envvar="SPARKINSTALL_CONFIG", rich_help_panel=_NODE),
]
Stack = Annotated[
    str | None, typer.Option(help="The set of pins: a shipped name or a YAML file.", rich_help_panel=_NODE)
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one setting of the config file.", rich_help_panel=_NODE),
]
Platform = Annotated[
    str | None,
    typer.Option(help="Rehearsal: use the wheels of aarch64 or x86_64.", rich_help_panel=_NODE),
]
Full = Annotated[
    bool | None,
    typer.Option("--full/--partial", help="Rehearsal: install all 9 GB, not only vLLM's wheel.", rich_help_panel=_NODE),
]
Only = Annotated[
    list[str] | None,
    typer.Option(metavar="STEP", help="Run only this step (may repeat).", rich_help_panel=_CHOICE),
]
Skip = Annotated[
    list[str] | None,
    typer.Option(metavar="STEP", help="Skip this step (may repeat).", rich_help_panel=_CHOICE),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(metavar="CHECK", help="Ignore this check if it fails (may repeat).", rich_help_panel=_CHOICE),
]
Model = Annotated[
    str | None, typer.Option(metavar="MODEL", help="Serve this model as a service.", rich_help_panel=LINK)
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.", rich_help_panel=_OUTPUT)]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout (docs/json.md).", rich_help_panel=_OUTPUT)
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show every line of every program.", rich_help_panel=_OUTPUT)
]
Names = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Run only this step or probe (may repeat).", rich_help_panel=_CHOICE),
]
NotNames = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Skip this step or probe (may repeat).", rich_help_panel=_CHOICE),
]
HowFar = Annotated[
    str | None,
    typer.Option(
        "--level",
        metavar="LEVEL",
        help="Highest level to run: static, node, gpu, link, cluster or serving; default: all.",
        rich_help_panel=_CHOICE,
    ),
]
Measure = Annotated[
    bool,
    typer.Option("--measure", help="Include probes that keep the GPU or the link busy.", rich_help_panel=_CHOICE),
]
Junit = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write a JUnit report for CI.", rich_help_panel=_OUTPUT)
]
Strict = Annotated[bool, typer.Option("--strict", help="Count skipped as failed.", rich_help_panel=_OUTPUT)]


def known_level(name: str | None) -> Level | None:
    """Return the level with that name.

    Raises:
        BadUsage: there is none.
    """
    require_known([name] if name is not None else [], LEVELS, "level")
    return next((level for level in LEVELS if level == name), None)
