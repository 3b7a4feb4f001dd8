"""The command line: a group that has each verb's line of help and imports its module only when it is called."""

import inspect
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

import click
import typer
from typer.core import TyperGroup
from typer.models import ArgumentInfo

from sparkinstall import __version__

VERBS = {
    "all": ("all:all_", "Set up this node: install, patch, verify. A second run changes nothing."),
    "multi-node": (
        "multi_node:multi_node",
        "Set up this node as the head or a worker: network, Ray, vLLM. Later verbs remember the role.",
    ),
    "cluster": ("cluster:cluster", "Set up several nodes from one terminal: phase by phase, in parallel."),
    "plan": ("plan:plan", "Show what `all` would do, with every difference; change nothing."),
    "verify": (
        "verify:verify",
        "Check everything, and probe running processes; exit 3 on drift or failure.",
    ),
    "doctor": (
        "doctor:doctor",
        "Explain what is wrong, its impact and what to do, worst first; masked, so that it can be made public.",
    ),
    "diagnose": (
        "diagnose:diagnose",
        "Find known failures in logs: lines, cause and what to do; exit 3 if one was found.",
    ),
    "bundle": ("bundle:app", "Make and check one file with which a node without a network is set up."),
    "support-bundle": (
        "support_bundle:support_bundle",
        "Pack facts, journal, logs and a `verify` into one archive for an issue, masked; nothing is sent.",
    ),
    "uninstall": (
        "uninstall:uninstall",
        "Undo everything: restore every file byte for byte, remove every package that was not installed before.",
    ),
    "status": (
        "status:status",
        "Show what is installed and the state of each fix (reads only files; `verify` runs probes).",
    ),
    "stacks": (
        "stacks:stacks",
        "List the shipped stacks: versions, for whom each is, and who has run it on a Spark.",
    ),
    "recipes": ("recipes:app", "List recipes for models on Sparks, or show one and its command."),
    "fit": (
        "fit:fit",
        "Tell whether a model fits into a Spark, before it is downloaded; exit 3 if it does not, or that is unknown.",
    ),
    "ask": ("ask:ask", "Ask the served model one question; its answer appears while it is made."),
    "bench": ("bench:app", "Measure the served model with vLLM's own benchmark: `bench [SCENARIO...]`."),
    "watch": (
        "watch:watch",
        "Show how the served model does: latencies, load, cache, memory and GPU, until Ctrl-C.",
    ),
    "health": (
        "health:health",
        "Tell what makes this node slow or unsafe while it serves; exit 3 if anything does.",
    ),
    "monitoring": (
        "monitoring:app",
        "Print the files with which Prometheus and Grafana watch nodes, or install Debian's Prometheus.",
    ),
    "models": (
        "models:app",
        "Pull models from the hub into its cache; copy them to other nodes; list, verify or remove them.",
    ),
    "serve": (
        "serve:app",
        "Serve a recipe or a model until it answers: `serve RECIPE|MODEL`; then status, logs, stop, restart, wait.",
    ),
    "run": ("run:run", "Run only these steps, not those that they need."),
    "cache": ("cache:app", "List, verify or prune the downloads and builds in your cache."),
    "settings": ("settings:app", "Show every setting and its origin."),
    "node": ("node:app", ""),
}
"""Each verb's module and function (or group), and its line of help, if any."""


def command(verb: str) -> click.Command:
    """Import the module of a verb and return its command."""
    place, line = VERBS[verb]
    app = imported(place)
    if not isinstance(app, typer.Typer):
        function, app = app, typer.Typer(add_completion=False)
        app.command(verb)(function)
    found = typer.main.get_command(app)
    found.hidden = not line
    _complete(found)
    return found


def _complete(found: click.Command) -> None:
    """Give the arguments of a command, or of all of a group, their help again, which typer 0.25 loses to click 8.5."""
    for each in found.commands.values() if isinstance(found, click.Group) else ():
        _complete(each)
    if isinstance(found, TyperGroup):
        # click suggests already.
        found.suggest_commands = False
    words = inspect.signature(found.callback).parameters if found.callback else {}
    for param in found.params:
        annotated = getattr(words.get(param.name or ""), "annotation", None)
        for told in getattr(annotated, "__metadata__", ()):
            if isinstance(param, click.Argument) and isinstance(told, ArgumentInfo):
                param.help = told.help


def imported(place: str) -> Any:
    """Return what `MODULE:NAME` of the command line names; its module is imported only now."""
    module, _, name = place.partition(":")
    return getattr(import_module(f"sparkinstall.cli.{module}"), name)


class LazyGroup(TyperGroup):
    """A group whose commands are only names with a line of help until one is called."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        for name, (_, line) in VERBS.items():
            self.add_command(click.Command(name, help=line, hidden=not line))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse an empty argument: it comes from a variable that is not set, and would count as something else."""
        for before, word in zip(["", *args], args, strict=False):
            if not word or (word.startswith("--") and word.endswith("=")):
                option = word.removesuffix("=") or before
                of = f"{'of' if option.startswith('-') else 'after'} {option} " if option else ""
                ctx.fail(f"the value {of}is empty")
        return super().parse_args(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each verb with its whole line."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in VERBS.items() if line])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the real command of the verb that `args` begin with, and the arguments that are left for it."""
        name, named, rest = super().resolve_command(ctx, args)
        return name, command(name) if name and named else named, rest


def program() -> typer.Typer:
    """The whole command line."""
    app = typer.Typer(
        cls=LazyGroup,
        help="Set up a native, patched and verified vLLM on a DGX Spark, and undo it.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        # click suggests already.
        suggest_commands=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
        epilog="Exit codes: 0 good, 1 failed, 2 usage, 3 drift, 4 preflight, 5 some nodes failed, 130 interrupted "
        "(docs/exit-codes.md).",
    )
    app.callback()(_root)
    return app


def _version(asked: bool) -> None:
    if asked:
        print(f"sparkinstall {__version__}")
        raise typer.Exit


def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    del version


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command line (None: this process's own); with `--json` usage errors are one JSON object too."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        sys.exit(program()(words, prog_name="sparkinstall", standalone_mode=False, obj=main))
    except Exception as error:
        # typer's own exceptions have moved between packages; what they have in common is this.
        if not hasattr(error, "format_message"):
            raise
        sys.exit(imported("run_command:report_usage")(words, error))
