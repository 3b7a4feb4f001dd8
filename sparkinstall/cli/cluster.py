"""`sparkinstall cluster HOST HOST...`: set up several nodes from one terminal, over the user's own ssh."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType
from typing import Annotated, Any

import typer
from msgspec.structs import replace

from sparkinstall import config as configuration
from sparkinstall.cli import options
from sparkinstall.cli.cluster_live import connected
from sparkinstall.cli.cluster_proof import verify
from sparkinstall.cli.cluster_text import end, show_nodes, show_plan
from sparkinstall.cli.run_command import CommandResult, Output, confirm, verb
from sparkinstall.cli.text_output import console
from sparkinstall.cluster.orchestrate import Barrier, Cluster, ClusterOptions, members, options_of
from sparkinstall.cluster.protocol import Uninstalled
from sparkinstall.cluster.uploads import uploads
from sparkinstall.config import Config
from sparkinstall.core import catalogue
from sparkinstall.core.session import Target, config_files
from sparkinstall.core.status import NodeStatus
from sparkinstall.errors import BadUsage
from sparkinstall.schema import require_known
from sparkinstall.system import Undone


@verb("cluster", "config", "stack", "set_")
def cluster(
    target: Target,
    output: Output,
    words: Annotated[
        list[str],
        typer.Argument(
            # Without the blanks rich would treat it as markup, and usage errors would lose it.
            metavar="[ plan|verify|status|uninstall ] HOST...",
            help="The nodes as you write them after `ssh`, the head first. A verb before them runs only that verb.",
        ),
    ],
    interface: Annotated[
        str | None, options.link(metavar="NAME", help="The QSFP interface with the cable, on every node.")
    ] = None,
    model: options.Model = None,
    serve: options.Serve = None,
    only: options.Only = None,
    skip: options.Skip = None,
    ignore: options.Ignore = None,
    level: options.HowFar = None,
    measure: options.Measure = False,
    strict: options.Strict = False,
    junit: options.Junit = None,
    yes: options.Yes = False,
) -> CommandResult:
    """Set up several nodes from one terminal: phase by phase, in parallel."""
    given = {"network.interface": interface, "serving.model": model}
    names = (tuple(only or ()), tuple(skip or ()), tuple(ignore or ()))
    settings = _settings(replace(target, role=given))
    if serve is not None and model is not None:
        raise BadUsage("--serve and --model both name what is served", hint="name one of them")
    highest = options.known_level(level)
    wanted = ClusterOptions(*settings, *names, highest, measure, strict, junit, yes, output.json, serve or "")
    return _cluster(words, wanted, output.verbose)


def _cluster(words: list[str], wanted: ClusterOptions, verbose: bool) -> CommandResult:
    verbs = {"plan": _plan, "verify": verify, "status": _status, "uninstall": _uninstall}
    name = words[0] if words[0] in verbs else ""
    _refuse_misspelt(words, list(verbs))
    hosts = words[1:] if name else words
    if not hosts:
        given = f"{name} --serve {wanted.serve}" if wanted.serve else name
        raise BadUsage(f"`cluster {name}` names no nodes", hint=f"sparkinstall cluster {given} spark-1 spark-2")
    if name != "verify" and wanted.of_verify:
        option = wanted.of_verify[0]
        raise BadUsage(f"{option} is for `cluster verify`", hint=f"sparkinstall cluster verify {option} ... HOST...")
    if name not in ("", "plan") and wanted.serve:
        raise BadUsage(
            f"--serve is not for `cluster {name}`", hint=f"sparkinstall cluster --serve {wanted.serve} HOST..."
        )
    with _opened(hosts, wanted, verbose, uploading=name not in ("status", "uninstall")) as opened:
        return verbs.get(name, _up)(opened)


def _refuse_misspelt(words: list[str], verbs: list[str]) -> None:
    """Reject a misspelt verb: it would count as a host, and the other hosts would be set up.

    Raises:
        BadUsage: the first word resembles a verb, and hosts follow.
    """
    near = get_close_matches(words[0].lower(), verbs, n=1, cutoff=0.75)
    if near and words[0] not in verbs and len(words) > 1:
        raise BadUsage(
            f"`cluster` has no verb `{words[0]}`",
            hint=f"did you mean the verb `{near[0]}`? A host of that name is `USER@{words[0]}`, or its address",
        )


@contextmanager
def _opened(hosts: list[str], wanted: ClusterOptions, verbose: bool, *, uploading: bool) -> Iterator[Cluster]:
    """Return the nodes; `uploading`: with the files that settings name."""
    settings, files = uploads(wanted.settings) if uploading else (wanted.settings, ())
    require_known(wanted.only + wanted.skip, [step.name for step in catalogue.STEPS], "step")
    found = members(hosts, wanted.config)
    with connected(found, wanted, verbose, lambda each: options_of(each, found, settings), files) as opened:
        yield opened


def _settings(target: Target) -> tuple[Config, dict[str, Any]]:
    """Return the config with the settings given here, which are passed to every node."""
    files = map(configuration.read_layer, config_files(target.config))
    layers = [*files, configuration.Layer("the command line", target.values())]
    config, _ = configuration.build(layers)
    said = {name: value for layer in layers for name, value in layer.values.items()}
    return config, {name: value for name, value in said.items() if name not in ("cluster.role", "cluster.address")}


def _up(cluster: Cluster) -> CommandResult:
    if cluster.options.serve:
        return _serve(cluster)
    try:
        _agree(cluster)
        cluster.up()
        cluster.verify()
        cluster.barrier()
    except Barrier:
        pass
    return end(cluster, lambda: _show_up(cluster))


def _agree(cluster: Cluster) -> None:
    """Show the plan, and ask."""
    cluster.look()
    _tell_plan(cluster)
    cluster.require_ready()
    if _drifts(cluster):
        confirm(f"Go on, on {len(cluster.nodes)} nodes?", agreed=cluster.options.yes, default=True)


def _serve(cluster: Cluster) -> CommandResult:
    """Set up the nodes, and serve a model until it answers."""
    way = _of_serving()
    answering: dict[str, Any] = {}
    serving = None
    try:
        serving = way.together(cluster, cluster.options.serve)
        if not cluster.options.json:
            cluster.pause()
            way.show_changes(serving)
        _agree(cluster)
        with way.restoring(cluster, serving):
            cluster.up()
            serving.wait()
        answering = {"serving": serving.answering}
        cluster.verify()
        cluster.barrier()
    except Barrier:
        pass

    def tell() -> None:
        _show_up(cluster)
        if serving:
            way.show_served(cluster, serving)

    return end(cluster, tell, **answering)


def _of_serving() -> ModuleType:
    return import_module("sparkinstall.cli.cluster_serve")


def _tell_plan(cluster: Cluster) -> None:
    if not cluster.options.json:
        cluster.pause()
        show_plan(cluster)


def _drifts(cluster: Cluster) -> bool:
    return any(report.is_due for node in cluster.nodes for report in node.look.steps)


def _show_up(cluster: Cluster) -> None:
    if cluster.failed:
        return
    changed = any(done.outcome == "changed" for done in cluster.done)
    what = "is set up and verified" if changed else "is up to date; nothing was changed"
    console().print(f"[green bold]✓[/] The cluster of {len(cluster.nodes)} nodes {what}.")


def _plan(cluster: Cluster) -> CommandResult:
    try:
        if cluster.options.serve:
            _of_serving().together(cluster, cluster.options.serve)
        cluster.look()
    except Barrier:
        pass
    else:
        _tell_plan(cluster)
    said = "" if _drifts(cluster) or cluster.failed else "\nNothing would be changed."
    return end(cluster, lambda: print(said))


def _status(cluster: Cluster) -> CommandResult:
    try:
        cluster.identify("status")
        cluster.status()
    except Barrier:
        pass
    lines = {done.host: _standing(status) for done, status in cluster.replies("status", NodeStatus)}
    return end(cluster, lambda: show_nodes(cluster, lines))


def _uninstall(cluster: Cluster) -> CommandResult:
    hosts = ", ".join(node.host for node in cluster.nodes)
    question = f"Uninstall everything that sparkinstall installed on {hosts}?"
    try:
        cluster.identify("uninstall")
        cluster.pause()
        confirm(question, agreed=cluster.options.yes, default=False)
        cluster.uninstall()
    except Barrier:
        pass
    lines = {done.host: _undone(reply.changes) for done, reply in cluster.replies("uninstall", Uninstalled)}
    return end(cluster, lambda: show_nodes(cluster, lines))


def _standing(status: NodeStatus) -> str:
    if not status.installed:
        return "sparkinstall has set nothing up here"
    done = sum(each.standing in ("proven", "done") for each in status.fixes)
    return f"stack {status.stack}, {done} of {len(status.fixes)} fixes done, last change {status.last_change}"


def _undone(changes: Sequence[Undone]) -> str:
    outcomes = [each.outcome for each in changes]
    kept = outcomes.count("kept")
    words = f"restored {outcomes.count('restored')}, removed {outcomes.count('removed')}"
    return f"{words}, kept {kept}" if kept else words
