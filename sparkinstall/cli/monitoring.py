"""`sparkinstall monitoring`: files for Prometheus; changes nothing."""

from typing import Annotated, Literal

import typer
from msgspec import Struct

from sparkinstall.cli.run_command import CommandResult, Output, verb
from sparkinstall.core.session import Target, open_session
from sparkinstall.measure.monitoring import rule_file, scrape_config
from sparkinstall.measure.rounds import slo_of

app = typer.Typer(
    add_completion=False, help="Print the files with which Prometheus watches nodes.", no_args_is_help=True
)

What = Annotated[
    Literal["scrape", "rules"], typer.Argument(metavar="scrape|rules", help="What to scrape, or records and alerts.")
]
Hosts = Annotated[
    list[str] | None,
    typer.Argument(metavar="[HOST]...", help="Nodes to scrape; none: this one.", show_default=False),
]
Workers = Annotated[
    list[str] | None, typer.Option("--worker", metavar="HOST", help="A node without an API; may be repeated.")
]
KeyFile = Annotated[
    str | None,
    typer.Option("--key-file", metavar="FILE", help="The API's key, in a file that Prometheus may read."),
]
SloText = Annotated[str, typer.Option("--slo", metavar="LIMITS", help="Limits of the 95th percentiles for alerts.")]


class Rendered(Struct, frozen=True):
    """Result of `monitoring render`: the file's text."""

    text: str


@app.callback()
def monitoring() -> None:
    """Print the files with which Prometheus watches nodes."""


@app.command()
@verb("monitoring render", "root", "config", reads_only=True)
def render(
    target: Target,
    _output: Output,
    what: What,
    hosts: Hosts = None,
    worker: Workers = None,
    key_file: KeyFile = None,
    slo: SloText = "ttft=500ms,itl=250ms",
) -> CommandResult:
    """Print the configuration of Prometheus, or its rules: percentiles to record, and the alerts of `watch`."""
    port, heads = open_session(target).node.config.serving.port, hosts or ["127.0.0.1"]
    text = scrape_config(heads, worker or (), port, key_file or "") if what == "scrape" else rule_file(slo_of(slo, 95))
    return CommandResult(data=Rendered(text), show=lambda: print(text, end=""))
