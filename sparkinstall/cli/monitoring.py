"""`sparkinstall monitoring`: Prometheus and Grafana that watch nodes: their files, and Debian's Prometheus itself."""

import sys
from typing import Annotated, Literal

import typer
from msgspec import Struct

from sparkinstall.cli import options
from sparkinstall.cli.install import dialog_of
from sparkinstall.cli.parts import install_part, withdrawn_part
from sparkinstall.cli.run_command import CommandResult, Output, confirm, verb
from sparkinstall.core import parts
from sparkinstall.core.catalogue import named
from sparkinstall.core.session import Session, Target, open_session
from sparkinstall.errors import BadUsage
from sparkinstall.measure.dashboard import dashboard
from sparkinstall.measure.rounds import slo_of
from sparkinstall.measure.vllm_dashboards import LICENCE, VLLM_DASHBOARDS, VllmDashboard, fetched
from sparkinstall.steps.prometheus_files import rule_file, scrape_config

app = typer.Typer(
    add_completion=False,
    help="Print the files with which Prometheus and Grafana watch nodes, or install Debian's Prometheus.",
    no_args_is_help=True,
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


PortOption = Annotated[int | None, typer.Option("--port", metavar="PORT", help="Its port on 127.0.0.1 (9090).")]
Days = Annotated[int | None, typer.Option("--days", metavar="DAYS", help="How long it keeps what it records (15).")]
OwnSlo = Annotated[
    str | None, typer.Option("--slo", metavar="LIMITS", help="Limits of the 95th percentiles for its alerts.")
]
_STEP = "monitoring"
_SETTINGS = tuple(f"monitoring.{name}" for name in ("prometheus", "port", "days", "ttft_ms", "itl_ms"))


class Rendered(Struct, frozen=True, omit_defaults=True):
    """Result of `monitoring render`: the file's text; of what vLLM has, where it is from, and its licence."""

    text: str
    source: str = ""
    licence: str = ""


@app.callback()
def monitoring() -> None:
    """Print the files with which Prometheus and Grafana watch nodes, or install Debian's Prometheus."""


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
    limits = slo_of(slo, 95)
    files = {
        "scrape": lambda: scrape_config(heads, worker or (), port, key_file or ""),
        "rules": lambda: rule_file(limits.ttft, limits.itl),
        "dashboard": lambda: dashboard(limits),
    }
    text = files[what]()
    return CommandResult(data=Rendered(text), show=lambda: print(text, end=""))


@app.command()
@verb("monitoring install", "root", "config")
def install(
    target: Target,
    output: Output,
    port: PortOption = None,
    days: Days = None,
    slo: OwnSlo = None,
    yes: options.Yes = False,
) -> CommandResult:
    """Install Debian's Prometheus and node_exporter, listening on this node alone, with the files of `render`."""
    limits = slo_of(slo, 95) if slo else None
    values = {
        "monitoring.prometheus": True,
        "monitoring.port": port,
        "monitoring.days": days,
        "monitoring.ttft_ms": round(limits.ttft or 0) if limits else None,
        "monitoring.itl_ms": round(limits.itl or 0) if limits else None,
    }
    return install_part(target, named(_STEP), values, "monitoring install", output, yes, _show_installed)


def _show_installed(session: Session) -> None:
    node, where = session.node, "On a node, " if session.node.rehearsal else ""
    if node.role == "worker":
        print(f"✓ {where}node_exporter listens at {node.address} for the Prometheus of the head.")
    else:
        port = node.config.monitoring.port
        print(f"✓ {where}Prometheus watches this node: http://127.0.0.1:{port}")
        print(f"    ssh -L {port}:127.0.0.1:{port} NODE   brings that address to another machine")
    if not node.config.health.timer:
        print(
            f"    sparkinstall health --install{session.root_option}         has it watch the health of this node too"
        )
    print(f"    sparkinstall monitoring uninstall{session.root_option}     undoes this")


@app.command()
@verb("monitoring uninstall", "root", "config")
def uninstall(target: Target, _output: Output, yes: options.Yes = False) -> CommandResult:
    """Undo `monitoring install`: what Prometheus has recorded is removed too."""
    question = "Remove Prometheus with all that it has recorded?"

    def agree() -> None:
        confirm(question, agreed=yes or target.root is not None, default=False)

    done = parts.withdraw(target, named(_STEP), _SETTINGS, "monitoring uninstall", agree)
    if done.found:
        _restore_health(target)
    return withdrawn_part(done, "Prometheus with node_exporter")


def _restore_health(target: Target) -> None:
    """Bring back what the timer of `health` has written: Debian's package removes its whole folder."""
    session = open_session(target)
    if session.node.config.health.timer:
        quiet = Output(json=True)
        parts.install(session, named("health"), "monitoring uninstall", dialog_of(session, quiet, yes=True))


def _of_vllm(of: VllmDashboard) -> CommandResult:
    text = fetched(of)

    def show() -> None:
        print(f"{of.url}: {LICENCE}", file=sys.stderr)
        print(text, end="")

    return CommandResult(data=Rendered(text, of.url, LICENCE), show=show)
