"""Models on other nodes: copy them there, and ask which of them are there."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

from msgspec import Struct, field
from rich.filesize import decimal

from sparkinstall.cli.cluster_live import connected
from sparkinstall.cli.cluster_text import named
from sparkinstall.cli.live_output import Pace
from sparkinstall.cli.run_command import CommandResult, Output
from sparkinstall.cli.text_output import shown
from sparkinstall.cluster import model_copies
from sparkinstall.cluster.orchestrate import Cluster, ClusterOptions, Done, require_hosts
from sparkinstall.cluster.protocol import Arriving, Fetched, Reply
from sparkinstall.cluster.remote import Member, OnLine, RemoteNode
from sparkinstall.core import models as use
from sparkinstall.core.session import Session, Target, open_session
from sparkinstall.errors import BadUsage, Exit, Problem


class Others(Struct, frozen=True):
    """What other nodes have: complete snapshots as MODEL@COMMIT by node. `silent`: why a node does not answer."""

    whole: Mapping[str, Sequence[str]] = field(default_factory=dict)
    silent: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    code: Exit = Exit.GOOD

    def having(self, snapshot: str) -> str:
        """Return the nodes that have MODEL@COMMIT."""
        return ", ".join(host for host, found in self.whole.items() if snapshot in found)


def synced(words: Sequence[str], target: Target, output: Output) -> CommandResult:
    """Copy the models among the words to the nodes among them."""
    session = open_session(target)
    here = {each.id for each in use.listed().models}
    names = [each for each in words if _is_model(each, here)]
    hosts = _hosts([each for each in words if each not in names], session)
    if not hosts:
        hint = "name them: `sparkinstall models sync MODEL spark-2`; the head of an installed cluster knows its workers"
        raise BadUsage("`models sync` names no nodes", hint=hint)
    snapshots = model_copies.whole(names)
    own = model_copies.own(session.system, session.node.address)
    with _connected(hosts, session, output) as cluster, model_copies.offering(snapshots, own, _Paces().words) as sync:
        cluster.on_each("sync", sync.work)
        cluster.pause()
    data = {
        "models": [each.name for each in snapshots],
        "nodes": [_outcome(each) for each in cluster.done],
    }
    return CommandResult(_code(cluster), data, lambda: _show(cluster.done), _problems(cluster))


def _is_model(word: str, here: set[str]) -> bool:
    return ("/" in word and "://" not in word) or word in here


def _hosts(named: Sequence[str], session: Session) -> list[str]:
    """Return the nodes that were named, else the workers of this head."""
    require_hosts(named)
    return list(named) or (list(session.node.peers) if session.node.role == "head" else [])


def _connected(hosts: Sequence[str], session: Session, output: Output) -> AbstractContextManager[Cluster]:
    members = [Member(host, "worker", rank, "") for rank, host in enumerate(hosts, 1)]
    return connected(members, ClusterOptions(session.node.config, {}, json=output.json), output.verbose)


class _Paces:
    """The progress of several nodes in words."""

    def __init__(self) -> None:
        self._paces: dict[tuple[str, str], Pace] = {}

    def words(self, host: str, came: Arriving) -> str:
        if not came.total:
            return came.what
        return f"{came.what}: {self._paces.setdefault((host, came.what), Pace()).words(came.done, came.total)}"


def _outcome(done: Done) -> dict[str, object]:
    came = done.data if isinstance(done.data, Fetched) else Fetched()
    return {
        "host": done.host,
        "outcome": done.outcome,
        "seconds": round(done.seconds, 3),
        "files": came.files,
        "bytes": came.bytes,
        "errors": done.problems,
    }


def _code(cluster: Cluster) -> Exit:
    return Exit.SOME_NODES if cluster.failed else Exit.GOOD


def _problems(cluster: Cluster) -> tuple[Problem, ...]:
    return tuple(named(done.host, problem) for done in cluster.done for problem in done.problems)


def _show(ended: Sequence[Done]) -> None:
    for done in ended:
        came = done.data if isinstance(done.data, Fetched) else Fetched()
        if done.outcome != "failed":
            what = (
                f"{came.files} files, {decimal(came.bytes)}" if came.changed else "has everything; nothing was copied"
            )
            print(shown(f"✓ {done.host}: {what}"))


def asked(hosts: Sequence[str], target: Target, output: Output) -> Others:
    """Ask nodes for the models in their caches. One that was not named and does not answer is no failure."""
    session = open_session(target)
    known = _hosts(hosts, session)
    if not known:
        return Others()
    with _connected(known, session, output) as cluster:
        cluster.on_each("models", _listed)
        cluster.pause()
    whole = {done.host: _complete(done.data) for done in cluster.done if isinstance(done.data, use.ModelList)}
    silent = {done.host: problem.message for done in cluster.done for problem in done.problems}
    return Others(whole, silent, _problems(cluster) if hosts else (), _code(cluster) if hosts else Exit.GOOD)


def _listed(node: RemoteNode, on_line: OnLine) -> Reply[use.ModelList]:
    return node.call(use.ModelList, "node", "models", on_line=on_line, bring=False)


def _complete(found: use.ModelList) -> list[str]:
    return [f"{model.id}@{each.commit}" for model in found.models for each in model.revisions if each.complete]
