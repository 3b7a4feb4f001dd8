"""The options that the verbs share."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from msgspec import Struct, field

_NODE, _CHOICE, _OUTPUT = "Which node", "Which parts", "Output"

Root = Annotated[
    Path | None,
    typer.Option(help="Rehearse beneath this folder instead of setting up this machine.", rich_help_panel=_NODE),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="The settings, a YAML file.", envvar="SPARKINSTALL_CONFIG", rich_help_panel=_NODE),
]
Stack = Annotated[
    str | None, typer.Option(help="The set of pins: a shipped name or a YAML file.", rich_help_panel=_NODE)
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="One setting, over the config file.", rich_help_panel=_NODE),
]
Platform = Annotated[
    str | None,
    typer.Option(help="Rehearsal: take the wheels of aarch64 or x86_64.", rich_help_panel=_NODE),
]
Full = Annotated[
    bool | None,
    typer.Option(
        "--full/--partial", help="Rehearsal: install all 9 GB, not vLLM's wheel alone.", rich_help_panel=_NODE
    ),
]
Only = Annotated[
    list[str] | None,
    typer.Option(metavar="STEP", help="Only this step (may repeat).", rich_help_panel=_CHOICE),
]
Skip = Annotated[
    list[str] | None,
    typer.Option(metavar="STEP", help="Skip this step (may repeat).", rich_help_panel=_CHOICE),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(metavar="CHECK", help="Ignore this check if it fails (may repeat).", rich_help_panel=_CHOICE),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.", rich_help_panel=_OUTPUT)]
Json = Annotated[
    bool, typer.Option("--json", help="One JSON object on stdout (docs/json.md).", rich_help_panel=_OUTPUT)
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Every line of every program.", rich_help_panel=_OUTPUT)]


class Target(Struct, frozen=True):
    """What one command line asked for. `None`: not said, so the last `all` or the config decides.

    `role` holds what the options of `multi-node` say, as settings. `confirm_later` and `token_file`
    are for this run alone.
    """

    root: Path | None = None
    config: Path | None = None
    stack: str | None = None
    settings: tuple[str, ...] = ()
    platform: str | None = None
    full: bool | None = None
    verbose: bool = False
    role: Mapping[str, Any] = field(default_factory=dict)
    confirm_later: bool = False
    token_file: Path | None = None

    def values(self) -> dict[str, Any]:
        """The settings that were given, by name; paths as they are meant from this folder."""
        from sparkinstall import config

        given = dict(config.parse_assignment(each) for each in self.settings)
        if self.stack is not None:
            given["stack"] = self.stack
        return config.anchored({**given, **self.role}, Path.cwd())

    def after(self, recorded: Mapping[str, Any]) -> dict[str, Any]:
        """The options that later verbs go on with: these, over those of former runs."""
        said = {
            "config": str(self.config.resolve()) if self.config else None,
            "platform": self.platform,
            "full": self.full,
            "settings": {**recorded.get("settings", {}), **self.values()} or None,
        }
        return {**recorded, **{name: value for name, value in said.items() if value is not None}}


def root_option(root: Path | None) -> str:
    """What a further command line needs to mean the same node, as it was given."""
    return f" --root {root}" if root else ""
