"""`sparkinstall cluster HOST HOST...`: the same on every node, from one terminal, over the user's own ssh."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparkinstall.cli import options
from sparkinstall.cli.cluster_result import ClusterChoice, end
from sparkinstall.cli.options import Target
from sparkinstall.cli.run_command import Answer, answer, confirm
from sparkinstall.cli.verify import HowFar, Junit, Measure, Strict, known_level
from sparkinstall.cluster.protocol import Status, Uninstalled
from sparkinstall.journal.undo import Undone

if TYPE_CHECKING:
    from sparkinstall.cluster.orchestrate import Cluster

_LINK = "The cluster"


def cluster(
    words: Annotated[
        list[str],
        typer.Argument(
            # The blanks keep rich from taking it for markup, and the usage line of an error from losing it.
            metavar="[ plan|verify|status|uninstall ] HOST...",
            help="The nodes as you write them after `ssh`, the head first. A verb before them asks for that alone.",
        ),
    ],
    config: options.ConfigFile = None,
    stack: options.Stack = None,
    set_: options.Set = None,
    interface: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The QSFP interface with the cable, on every node.", rich_help_panel=_LINK),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Serve this model as a service.", rich_help_panel=_LINK)
    ] = None,
    only: options.Only = None,
    skip: options.Skip = None,
    ignore: options.Ignore = None,
    level: HowFar = None,
    measure: Measure = False,
    strict: Strict = False,
    junit: Junit = None,
    yes: options.Yes = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Set up several nodes from one terminal: phase by phase, in parallel."""
    given = {"network.interface": interface, "serving.model": model}
    role = {name: value for name, value in given.items() if value is not None}
    asked = Target(None, config, stack, tuple(set_ or ()), verbose=verbose, role=role)

    def body() -> Answer:
        names = (tuple(only or ()), tuple(skip or ()), tuple(ignore or ()))
        choice = ClusterChoice(*names, yes, json, known_level(level), measure, strict, junit)
        return _cluster(words, asked, choice)

    answer("cluster", body, root=None, json=json, verbose=verbose)


def _cluster(words: list[str], asked: Target, choice: ClusterChoice) -> Answer:
    from sparkinstall.cli import cluster_proof as proof
    from sparkinstall.errors import BadUsage

    verbs: dict[str, Callable[[Cluster, ClusterChoice], Answer]] = {
        "plan": _plan, "verify": proof.verify, "status": _status, "uninstall": _uninstall,
    }  # fmt: skip
    verb = words[0] if words[0] in verbs else ""
    _refuse_misspelt(words, list(verbs))
    hosts = words[1:] if verb else words
    if not hosts:
        raise BadUsage(
            f"`cluster {verb}` needs the names of the nodes", hint=f"sparkinstall cluster {verb} spark-1 spark-2"
        )
    if verb != "verify" and choice.of_verify:
        option = choice.of_verify[0]
        raise BadUsage(f"{option} is for `cluster verify`", hint=f"sparkinstall cluster verify {option} ... HOST...")
    with _opened(hosts, asked, choice, carries=verb not in ("status", "uninstall")) as opened:
        return verbs.get(verb, _up)(opened, choice)


def _refuse_misspelt(words: list[str], verbs: list[str]) -> None:
    """Refuse a misspelt verb: it would count as a host, and the other hosts would be set up.

    Raises:
        BadUsage: the first word is nearly a verb, and hosts follow.
    """
    from difflib import get_close_matches

    from sparkinstall.errors import BadUsage

    near = get_close_matches(words[0].lower(), verbs, n=1, cutoff=0.75)
    if near and words[0] not in verbs and len(words) > 1:
        raise BadUsage(
            f"`cluster` has no verb `{words[0]}`",
            hint=f"did you mean the verb `{near[0]}`? A host of that name is `USER@{words[0]}`, or its address",
        )


@contextmanager
def _opened(hosts: list[str], asked: Target, choice: ClusterChoice, *, carries: bool) -> "Iterator[Cluster]":
    """The nodes; `carries`: with the files that settings name."""
    from sparkinstall.cli.cluster_screen import watching
    from sparkinstall.cluster import ssh
    from sparkinstall.cluster.orchestrate import Cluster, ClusterOptions, members
    from sparkinstall.cluster.remote import RemoteNode
    from sparkinstall.cluster.uploads import carried

    wanted, given = _settings(asked)
    values, files = carried(given) if carries else (given, ())
    every = ClusterOptions(wanted, values, choice.only, choice.skip, choice.ignore, choice.level, choice.measure)
    _require_known_steps(choice)
    with ssh.sockets() as sockets:
        nodes = [RemoteNode(each, ssh.Ssh(each.host, sockets), asked.verbose, files) for each in members(hosts, wanted)]
        watch = _Watch(lambda: watching(hosts, asked.verbose))
        try:
            yield Cluster(nodes, every, watch.tell, watch.end)
        finally:
            watch.end()
            for node in nodes:
                node.ssh.close()


class _Watch:
    """A screen that can be put away while a question is asked. Nodes tell side by side."""

    def __init__(self, begin: Callable[[], Any]) -> None:
        self._begin = begin
        self._open: Any = None
        self._tell: Any = None
        self._guard = threading.Lock()

    def tell(self, event: Any) -> None:
        with self._guard:
            if self._open is None:
                begun = self._begin()
                self._tell, self._open = begun.__enter__(), begun
            self._tell(event)

    def end(self) -> None:
        with self._guard:
            was, self._open = self._open, None
        if was is not None:
            was.__exit__(None, None, None)


def _settings(asked: Target) -> tuple[Any, dict[str, Any]]:
    """The config, and those settings that were said here: they go to every node."""
    from sparkinstall import config as configuration

    if asked.config:
        files = [asked.config]
    else:
        known = [Path(each).expanduser() for each in configuration.DEFAULT_FILES]
        files = [each for each in known if each.exists()]
    layers = [
        *(configuration.read_layer(each) for each in files),
        configuration.Layer("the command line", asked.values()),
    ]
    config, _ = configuration.build(layers)
    said = {name: value for layer in layers for name, value in layer.values.items()}
    return config, {name: value for name, value in said.items() if name not in ("cluster.role", "cluster.address")}


def _require_known_steps(choice: ClusterChoice) -> None:
    from sparkinstall.core import catalogue

    catalogue.require_known(choice.only + choice.skip, [step.name for step in catalogue.STEPS], "step")


def _up(cluster: "Cluster", choice: ClusterChoice) -> Answer:
    from sparkinstall.cluster.orchestrate import Barrier

    try:
        cluster.look()
        if not choice.json:
            _tell_plan(cluster)
        cluster.require_ready()
        if _drifts(cluster):
            confirm(f"Go on, on {len(cluster.nodes)} nodes?", agreed=choice.yes, default=True)
        cluster.up()
    except Barrier:
        pass
    return end(cluster, choice, lambda: _show_up(cluster))


def _tell_plan(cluster: "Cluster") -> None:
    from sparkinstall.cli.cluster_screen import show_plan

    cluster.pause()
    show_plan(cluster)


def _drifts(cluster: "Cluster") -> bool:
    from sparkinstall.cluster.orchestrate import is_due

    return any(is_due(report) for node in cluster.nodes for report in node.look.reports)


def _show_up(cluster: "Cluster") -> None:
    from sparkinstall.cli.text_output import console

    if cluster.failed:
        return
    changed = any(done.outcome == "changed" for done in cluster.done)
    what = "is set up and proven" if changed else "is up to date; nothing was changed"
    console().print(f"[green bold]✓[/] The cluster of {len(cluster.nodes)} nodes {what}.")


def _plan(cluster: "Cluster", choice: ClusterChoice) -> Answer:
    cluster.look()
    if not choice.json:
        _tell_plan(cluster)
    said = "" if _drifts(cluster) or cluster.failed else "\nNothing would be changed."
    return end(cluster, choice, lambda: print(said))


def _status(cluster: "Cluster", choice: ClusterChoice) -> Answer:
    from sparkinstall.cli.cluster_screen import show_nodes

    cluster.status()
    lines = {done.host: _standing(status) for done, status in cluster.replies("status", Status)}
    return end(cluster, choice, lambda: show_nodes(cluster, lines))


def _standing(status: Status) -> str:
    if not status.installed:
        return "nothing of sparkinstall is here"
    done = sum(each.standing in ("proven", "done") for each in status.fixes)
    return f"stack {status.stack}, {done} of {len(status.fixes)} fixes done, last change {status.last_change}"


def _uninstall(cluster: "Cluster", choice: ClusterChoice) -> Answer:
    from sparkinstall.cli.cluster_screen import show_nodes
    from sparkinstall.cluster.orchestrate import Barrier

    hosts = ", ".join(node.host for node in cluster.nodes)
    confirm(f"Uninstall everything that sparkinstall installed on {hosts}?", agreed=choice.yes, default=False)
    try:
        cluster.uninstall()
    except Barrier:
        pass
    lines = {done.host: _undone(reply.touches) for done, reply in cluster.replies("uninstall", Uninstalled)}
    return end(cluster, choice, lambda: show_nodes(cluster, lines))


def _undone(touches: Sequence[Undone]) -> str:
    outcomes = [each.outcome for each in touches]
    kept = outcomes.count("kept")
    words = f"restored {outcomes.count('restored')}, removed {outcomes.count('removed')}"
    return f"{words}, kept {kept}" if kept else words
