"""`sparkinstall monitoring`: files for Prometheus and Grafana; changes nothing."""

import sys
from typing import Annotated, Literal

import typer
from msgspec import Struct

from sparkinstall.cli.run_command import CommandResult, Output, verb
from sparkinstall.core.session import Target, open_session
from sparkinstall.errors import BadUsage
from sparkinstall.measure.dashboard import dashboard
from sparkinstall.measure.monitoring import rule_file, scrape_config
from sparkinstall.measure.rounds import slo_of
from sparkinstall.measure.vllm_dashboards import LICENCE, VLLM_DASHBOARDS, VllmDashboard, fetched

app = typer.Typer(
    add_completion=False, help="Print the files with which Prometheus and Grafana watch nodes.", no_args_is_help=True
)

What = Annotated[
    Literal["scrape", "rules", "dashboard"],
    typer.Argument(
        metavar="scrape|rules|dashboard", help="What to scrape; records and alerts; or a dashboard for Grafana."
    ),
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
SloText = Annotated[
    str, typer.Option("--slo", metavar="LIMITS", help="Limits of the 95th percentiles, for alerts and colours.")
]
Vllm = Annotated[
    Literal["overview", "performance", "queries"] | None,
    typer.Option(
        "--vllm", metavar="NAME", help="Download a dashboard of vLLM's own: overview, performance or queries."
    ),
]


class Rendered(Struct, frozen=True, omit_defaults=True):
    """Result of `monitoring render`: the file's text; of what vLLM has, where it is from, and its licence."""

    text: str
    source: str = ""
    licence: str = ""


@app.callback()
def monitoring() -> None:
    """Print the files with which Prometheus and Grafana watch nodes."""


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
    vllm: Vllm = None,
) -> CommandResult:
    """Print the configuration of Prometheus, its rules (percentiles, and the alerts of `watch`), or a dashboard."""
    if vllm and what != "dashboard":
        raise BadUsage("--vllm is for a dashboard", hint="`sparkinstall monitoring render dashboard --vllm NAME`")
    if vllm:
        return _of_vllm(VLLM_DASHBOARDS[vllm])
    port, heads = open_session(target).node.config.serving.port, hosts or ["127.0.0.1"]
    files = {
        "scrape": lambda: scrape_config(heads, worker or (), port, key_file or ""),
        "rules": lambda: rule_file(slo_of(slo, 95)),
        "dashboard": lambda: dashboard(slo_of(slo, 95)),
    }
    text = files[what]()
    return CommandResult(data=Rendered(text), show=lambda: print(text, end=""))


def _of_vllm(of: VllmDashboard) -> CommandResult:
    text = fetched(of)

    def show() -> None:
        print(f"{of.url}: {LICENCE}", file=sys.stderr)
        print(text, end="")

    return CommandResult(data=Rendered(text, of.url, LICENCE), show=show)
