"""Several nodes, phase by phase: each phase runs on its nodes in parallel and ends with a barrier."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from typing import Any, Literal, TypeVar

from msgspec import Struct, field
from msgspec.structs import replace

from sparkinstall.cluster import artifacts, bandwidth, drift, identity
from sparkinstall.cluster.artifacts import Handover
from sparkinstall.cluster.bandwidth import Between, Measurement
from sparkinstall.cluster.drift import Comparison
from sparkinstall.cluster.protocol import (
    Applied,
    Confirmed,
    Fetched,
    Identity,
    Look,
    Measurable,
    Reached,
    Reply,
    Token,
    Uninstalled,
    Verified,
)
from sparkinstall.cluster.remote import Member, NoTool, OnLine, RemoteNode, assignments, repeated
from sparkinstall.config import Config
from sparkinstall.config.cluster import require_sound
from sparkinstall.core import catalogue
from sparkinstall.core.status import NodeStatus
from sparkinstall.errors import BadUsage, Interrupted, PreflightFailed, Problem
from sparkinstall.probes import LEVELS, Level
from sparkinstall.probes import bandwidth as bandwidth_probes
from sparkinstall.resources import Conflict
from sparkinstall.schema import require_known
from sparkinstall.steps import StepPhase
from sparkinstall.system import processes

Outcome = Literal["unchanged", "changed", "failed", "blocked"]
Targets = Literal["all", "head", "workers"]


class Phase(Struct, frozen=True):
    """The steps that declare `of`, done between two barriers, on the nodes that `whom` names.

    `armed`: it changes the network under the rollback timer, and confirms it. `copied`: what the head has made goes
    to the nodes first. `same`: it begins only if all nodes have the same packages. `services`: it starts what the
    proof is about, so failed probes make it due; only it can tell what is in the way. `token`: the nodes need the
    head's Ray token.
    """

    name: str
    of: StepPhase
    whom: Targets = "all"
    armed: bool = False
    copied: bool = False
    same: bool = False
    services: bool = False
    token: bool = False

    @property
    def steps(self) -> tuple[str, ...]:
        """Names, in the order of the catalogue."""
        return tuple(step.name for step in catalogue.STEPS if step.phase == self.of)


PHASES = (
    Phase("packages", "packages"),
    # Before the builds: what one node has built goes to the others over the fast link.
    Phase("network", "network", armed=True),
    Phase("head builds", "build", "head"),
    Phase("worker builds", "build", "workers", copied=True),
    Phase("head", "services", "head", same=True, services=True),
    Phase("workers", "services", "workers", services=True, token=True),
)


class Started(Struct, frozen=True):
    host: str
    phase: str


class Line(Struct, frozen=True):
    """A line that a node wrote to stderr."""

    host: str
    phase: str
    text: str


class Done(Struct, frozen=True):
    """The outcome of a phase on one node; `data` is the reply of its verb. `seconds` is wall time."""

    host: str
    phase: str
    outcome: Outcome
    seconds: float = 0.0
    data: Struct | None = None
    problems: Sequence[Problem] = ()


Tell = Callable[[Started | Line | Done], None]
Work = Callable[[RemoteNode, OnLine], Reply[Struct]]
_Message = TypeVar("_Message", bound=Struct)


class ClusterOptions(Struct, frozen=True):
    """The options of `cluster`; `level` to `junit` are for `verify`, `serve` names a recipe or a model."""

    config: Config
    settings: Mapping[str, Any]
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    level: Level | None = None
    measure: bool = False
    strict: bool = False
    junit: Path | None = None
    yes: bool = False
    json: bool = False
    serve: str = ""

    @property
    def of_verify(self) -> list[str]:
        """The given options that only `verify` has."""
        given = {"--level": self.level, "--measure": self.measure, "--strict": self.strict, "--junit": self.junit}
        return [name for name, value in given.items() if value]


def members(hosts: Sequence[str], config: Config) -> tuple[Member, ...]:
    """The hosts as nodes: the first is the head, the others are the workers in their order.

    Raises:
        BadUsage: a host is named twice or cannot be one, or the subnet has too few addresses.
        BadConfig: the addresses or ports of the config cannot be a cluster's.
    """
    require_hosts(hosts)
    if len(hosts) == 1:
        return (Member(hosts[0], "single", 0, config.cluster.head),)
    workers = _workers(config, len(hosts) - 1)
    require_sound(replace(config, cluster=replace(config.cluster, role="head", address=None, workers=workers)))
    addresses = (config.cluster.head, *workers)
    roles = ("head", *["worker"] * (len(hosts) - 1))
    return tuple(
        Member(h, role, rank, a) for rank, (h, role, a) in enumerate(zip(hosts, roles, addresses, strict=True))
    )


def require_hosts(hosts: Sequence[str]) -> None:
    """Raise BadUsage if a host is named twice or cannot be one."""
    for host in hosts:
        if ":" in host.removeprefix("ssh://").rpartition("@")[0]:
            raise BadUsage("the user of a host contains `:`", hint="write user@host; ssh itself asks for a password")
        if hosts.count(host) > 1:
            raise BadUsage(f"{host} is named twice", hint="name every node once, the head first")
        if host.startswith("-") or not host.isprintable() or any(c.isspace() for c in host) or not host:
            raise BadUsage(f"{host!a} cannot be a host", hint="write it as you would after `ssh`")


def _workers(config: Config, count: int) -> tuple[str, ...]:
    """The workers' addresses: those of the config, then the ones that follow the highest of them."""
    known = config.cluster.workers[:count]
    named = [IPv4Address(each) for each in (config.cluster.head, *known)]
    link = IPv4Interface(f"{config.cluster.head}/{config.network.prefix_length}").network
    further = [max(named) + n for n in range(1, count - len(known) + 1)]
    if further and further[-1] >= link.broadcast_address:
        raise BadUsage(
            f"{link} has no more addresses after {max(named)} for {len(further)} further nodes",
            hint="name all of them in `cluster.workers`",
        )
    return (*known, *(str(each) for each in further))


def options_of(member: Member, everyone: Sequence[Member], settings: Mapping[str, Any]) -> list[str]:
    """The settings of one of the nodes as options: those for all, its role, and the addresses."""
    mine: dict[str, Any] = {**settings, "cluster.role": member.role}
    if member.role != "single":
        mine["cluster.head"] = everyone[0].address
        mine["cluster.workers"] = tuple(each.address for each in everyone[1:])
        mine["cluster.address"] = member.address
    return assignments(mine)


class Barrier(Problem):
    """A node failed, so all stop."""


class Cluster(Struct):
    """The nodes of one command line, the head first. `done`: the outcome of each phase and node, in order.

    `tell` is called with every event. `pause` closes the live view, so that something else can be printed. `order`:
    what the nodes are to serve, which goes with the requests that look and apply. `bring_model` copies that model.
    """

    nodes: Sequence[RemoteNode]
    options: ClusterOptions
    tell: Tell
    pause: Callable[[], None] = lambda: None
    done: list[Done] = field(default_factory=list)
    order: str = ""
    bring_model: Callable[[Sequence[RemoteNode]], None] | None = None
    _first_look: int = 0

    @property
    def failed(self) -> bool:
        return any(each.outcome == "failed" for each in self.done)

    def of(self, node: RemoteNode) -> list[Done]:
        """The outcome of each phase on this node."""
        return [each for each in self.done if each.host == node.host]

    def replies(self, phase: str, message: type[_Message]) -> list[tuple[Done, _Message]]:
        """The reply of each node in a phase; an empty message if it gave none."""
        ended = [each for each in self.done if each.phase == phase]
        return [(each, each.data if isinstance(each.data, message) else message()) for each in ended]

    def _set_up(self, node: RemoteNode, steps: Sequence[str], on_line: OnLine, token: str = "") -> Reply[Applied]:
        argv = ["all"] if node.member.role == "single" else ["multi-node", "--role", node.member.role]
        if node.member.role != "single" and "network" in steps:
            argv.append("--leave-armed")
        if token:
            argv += ["--token-file", "-"]
        argv += [*node.words, *repeated("--only", steps), *repeated("--ignore", self.options.ignore), "--yes"]
        argv += self._order_words
        if "packages" in steps and "packages" in self._drifted(node):
            node.bring_debian_packages(on_line)
        reply = node.call(Applied, *argv, on_line=on_line, stdin=token)
        node.changed |= bool(reply.data and reply.data.changed)
        return reply

    # --- the phases

    def look(self) -> None:
        """Install sparkinstall where it is missing, and read the state of every node; nothing else is changed."""
        self._first_look = len(self.done)
        self._at_once("look", self.nodes, self._look)
        if known := [each.name for node in self.nodes for each in node.look.preflight]:
            require_known(self.options.ignore, known, "check")
        for at, problem in identity.mistaken(self.nodes):
            self._refuse(at, [problem])

    def identify(self, verb: str, *, bring: bool = False) -> None:
        """Compare the machines before a verb that does not `look`; a node that does not answer is left to the verb.

        Raises:
            Barrier: one machine is named twice, or the nodes are in another order than they were set up in.
        """
        if len(self.nodes) < 2:
            return
        self._at_once("identify", self.nodes, lambda node, on_line: _identify(node, on_line, bring))
        for at, problem in identity.mistaken(self.nodes, verb):
            self._add(Done(self.nodes[at].host, verb, "failed", problems=(problem,)))
        self.barrier()

    def require_ready(self) -> None:
        """After `look`, report every node that gave no reply or cannot be set up.

        Raises:
            Barrier: there is such a node.
        """
        for at, node in enumerate(self.nodes):
            self._refuse(at, [*_unready(node, self.options.ignore), *_conflicts(node)])
        self.barrier()

    def _refuse(self, at: int, problems: Sequence[Problem]) -> None:
        """Report why node number `at` cannot be set up, unless its `look` has failed for another reason."""
        at += self._first_look
        if problems and self.done[at].outcome != "failed":
            self.done[at] = replace(self.done[at], outcome="failed", problems=problems)
            self.tell(self.done[at])

    def _look(self, node: RemoteNode, on_line: OnLine) -> Reply[Look]:
        chosen = [*repeated("--only", self.options.only), *repeated("--skip", self.options.skip)]
        reply = node.call(Look, "node", "look", *node.words, *chosen, *self._order_words, on_line=on_line)
        node.look = reply.data or Look()
        return reply

    @property
    def _order_words(self) -> list[str]:
        return ["--order", self.order] if self.order else []

    def up(self) -> None:
        """Apply everything that `look` found missing, with a barrier after each phase.

        Raises:
            Barrier: a node failed; the others stopped at the same barrier.
        """
        whom = {"all": self.nodes, "head": self.nodes[:1], "workers": self.nodes[1:]}
        for phase in PHASES:
            nodes = [node for node in whom[phase.whom] if self._steps(node, phase)]
            if not nodes:
                continue
            if phase.same:
                self._require_same()
            due = [node for node in nodes if self._is_due(node, phase)]
            if phase.copied:
                self._copy(due)
                if lacking := [node for node in due if "model" in self._drifted(node)]:
                    self._bring_model(lacking)
            for node in nodes:
                if node not in due:
                    self._add(Done(node.host, phase.name, "unchanged"))
            self._do(phase, due)
            self.barrier()

    def _bring_model(self, nodes: Sequence[RemoteNode]) -> None:
        if self.bring_model:
            self.bring_model(nodes)

    def _steps(self, node: RemoteNode, phase: Phase) -> list[str]:
        """The chosen steps of the phase that this node has."""
        there = {each.name for each in node.look.steps}
        return [step for step in phase.steps if step in there]

    def _is_due(self, node: RemoteNode, phase: Phase) -> bool:
        """Whether the phase has work there. What an earlier phase changed may have outdated what `look` found."""
        if node.changed or (phase.services and (node.look.unproven or self.order)):
            # With an order the node must remember it, even if it serves with these settings already.
            return True
        if phase.token and node.look.token != self.nodes[0].look.token:
            return True
        if phase.armed and node.look.armed:
            # A killed run left it unconfirmed: the rollback timer will undo it.
            return True
        return any(step in phase.steps for step in self._drifted(node))

    def _do(self, phase: Phase, due: Sequence[RemoteNode]) -> None:
        if not due:
            return
        token = self._token() if phase.token and "ray" in self._steps(due[0], phase) else ""
        self._at_once(
            phase.name, due, lambda node, on_line: self._set_up(node, self._steps(node, phase), on_line, token)
        )
        if phase.armed and not self.failed and len(self.nodes) > 1:
            self._confirm(due)

    def _copy(self, due: Sequence[RemoteNode]) -> None:
        """Copy the head's artifacts into the caches of the nodes that would download and build the same."""
        missing = {node.host: [s for s in self._drifted(node) if s in artifacts.STEPS] for node in due}
        steps = [step for step in artifacts.STEPS if any(step in each for each in missing.values())]
        workers = [node for node in due if missing[node.host]]
        if workers:
            head = self.nodes[0]
            self._at_once("copy", [head, *workers], Handover(head, workers, steps).work)

    def _drifted(self, node: RemoteNode) -> list[str]:
        return [each.name for each in node.look.steps if each.is_due]

    def _confirm(self, due: Sequence[RemoteNode]) -> None:
        """Keep the new network only after each node was reached over a new connection and over the link."""
        self._at_once("reach", due, self._reach)
        # Without a confirmation the nodes roll the network back.
        self.barrier()
        self._at_once("confirm", due, lambda node, on_line: node.call(Confirmed, "node", "confirm", on_line=on_line))

    def _reach(self, node: RemoteNode, on_line: OnLine) -> Reply[Reached]:
        others = [each.member.address for each in self.nodes if each is not node]
        return node.call(Reached, "node", "reach", *others, *node.words, on_line=on_line, new_connection=True)

    def _require_same(self) -> None:
        """Compare Python, vLLM, torch, Ray and NCCL of all nodes.

        Raises:
            Barrier: they differ.
        """
        stale = [node for node in self.nodes if node.changed]
        if stale:
            self._at_once("compare", stale, self._look)
            self.barrier()
            for node in stale:
                node.changed = False
        try:
            drift.require_same({node.host: node.look.versions for node in self.nodes})
        except Problem as problem:
            self._add(Done(self.nodes[0].host, "compare", "failed", problems=(problem,)))
            self.barrier()

    def _token(self) -> str:
        """The head's Ray token, which is passed from its stdout to the workers' stdin and nowhere else."""
        if self.nodes[0].look.executor != "ray":
            return ""
        found = Token()

        def ask(node: RemoteNode, on_line: OnLine) -> Reply[Token]:
            nonlocal found
            reply = node.call(Token, "node", "token", *node.words, on_line=on_line)
            found = reply.data or found
            # Without the message: `done`, which keeps the replies, is printed.
            return Reply(reply.code, problems=reply.problems)

        self._at_once("token", self.nodes[:1], ask)
        self.barrier()
        return found.token

    def verify(self) -> None:
        """Run every check and every probe on every node."""
        self._at_once("verify", self.nodes, self._verify)

    def _verify(self, node: RemoteNode, on_line: OnLine) -> Reply[Verified]:
        options = self.options
        chosen = [*repeated("--only", options.only), *repeated("--skip", options.skip)]
        chosen += [*(["--level", options.level] if options.level else []), *(["--measure"] if options.measure else [])]
        reply = node.call(Verified, "verify", *node.words, *chosen, on_line=on_line)
        if reply.problems or not reply.code:
            return reply
        return Reply(reply.code, reply.data, (_not_proven(reply.data or Verified()),))

    def compare(self) -> Comparison | None:
        """The differences between the nodes that `verify` asked; None if fewer than two replied."""
        asked = {done.host: each.comparables for done, each in self.replies("verify", Verified) if each.comparables}
        if len(asked) < 2 or LEVELS.index(self.options.level or LEVELS[-1]) < LEVELS.index("cluster"):
            return None
        found = drift.compared(asked)
        if failed := [row for row in found.rows if row.weight == "fail"]:
            names = ", ".join(row.name for row in failed)
            hints = "; ".join(f"{row.name}: {row.hint}" for row in failed)
            self.fail(self.nodes[0].host, "compare", Problem(f"the nodes differ in {names}", hint=hints))
        return found

    def measure(self) -> list[Between]:
        """The bandwidth between the head and each worker, one measurement after the other."""
        if len(self.nodes) < 2:
            return []
        self._at_once("ready", self.nodes, self._measurable)
        why = {done.host: each.why_not for done, each in self.replies("ready", Measurable)}
        head, kinds = self.nodes[0], bandwidth_probes.kinds(self.options.config.network.transport)
        found: list[Between] = []
        for worker, kind in ((worker, kind) for worker in self.nodes[1:] for kind in kinds):
            out = bandwidth.left_out(head, worker, kind, why)
            found += [out] if out else [self._between(*way, kind) for way in bandwidth.ways(head, worker, kind)]
        return found

    def _measurable(self, node: RemoteNode, on_line: OnLine) -> Reply[Measurable]:
        return node.call(Measurable, "node", "measurable", *node.words, on_line=on_line)

    def _between(self, asking: RemoteNode, responding: RemoteNode, kind: bandwidth_probes.Kind) -> Between:
        started, one = time.monotonic(), Measurement(asking, responding, kind)
        self._at_once(bandwidth_probes.probe_name(kind), (asking, responding), one.work)
        hosts = asking.host, responding.host
        finding = bandwidth_probes.judged(one.result, self.options.config.network.transport)
        if finding.verdict == "fail":
            sentence = f"{bandwidth_probes.probe_name(kind)} to {responding.host}: {finding.found}"
            self.fail(asking.host, "measure", Problem(sentence, hint=finding.hint))
        return Between(hosts, kind, finding, time.monotonic() - started, one.result)

    def fail(self, host: str, phase: str, problem: Problem) -> None:
        """Record a failure that the node itself did not report."""
        self.done.append(Done(host, phase, "failed", problems=(problem,)))

    def status(self) -> None:
        """Ask every node what is installed."""
        self._at_once("status", self.nodes, lambda node, on_line: _as_it_is(node, on_line, NodeStatus, "status"))

    def uninstall(self) -> None:
        """Uninstall everything, the workers first: they depend on the head.

        Raises:
            Barrier: a worker failed; the head was left as it is.
        """
        for nodes in (self.nodes[1:], self.nodes[:1]):
            self._at_once(
                "uninstall", nodes, lambda node, on_line: _as_it_is(node, on_line, Uninstalled, "uninstall", "--yes")
            )
            self.barrier()

    # --- in parallel

    def on_each(self, phase: str, work: Work, nodes: Sequence[RemoteNode] | None = None) -> None:
        """Do the work on every node, or on these; where it fails on one, the others go on."""
        self._at_once(phase, self.nodes if nodes is None else nodes, work)

    def _at_once(self, phase: str, nodes: Sequence[RemoteNode], work: Work) -> None:
        stop = threading.Event()
        if not nodes:
            return
        with ThreadPoolExecutor(max_workers=len(nodes)) as pool:
            try:
                for future in [pool.submit(self._one, phase, node, work, stop) for node in nodes]:
                    self.done.append(future.result())
            except BaseException:
                stop.set()
                processes.stop_all()
                raise

    def _one(self, phase: str, node: RemoteNode, work: Work, stop: threading.Event) -> Done:
        if stop.is_set():
            return Done(node.host, phase, "blocked")
        self.tell(Started(node.host, phase))
        started = time.monotonic()
        try:
            reply = work(node, lambda text: self.tell(Line(node.host, phase, text)))
        except Interrupted:
            raise
        except Problem as problem:
            reply = Reply(problems=(problem,))
        problems = reply.problems
        if reply.code and not problems:
            problems = (Problem(f"`{phase}` exited with {reply.code} without a message"),)
        changed = isinstance(reply.data, Applied | Fetched) and reply.data.changed
        outcome: Outcome = "failed" if problems else "changed" if changed else "unchanged"
        done = Done(node.host, phase, outcome, time.monotonic() - started, reply.data, problems)
        self.tell(done)
        return done

    def _add(self, done: Done) -> None:
        self.done.append(done)
        self.tell(done)

    def barrier(self) -> None:
        """Stop if a node has failed.

        Raises:
            Barrier: see above.
        """
        bad = sorted({each.host for each in self.done if each.outcome == "failed"})
        if bad:
            raise Barrier(f"stopped: {', '.join(bad)}")


def _as_it_is(node: RemoteNode, on_line: OnLine, message: type[_Message], *argv: str) -> Reply[_Message]:
    """Run a verb with any installed version of sparkinstall; the reply is empty if there is none."""
    try:
        return node.call(message, *argv, on_line=on_line, bring=False)
    except NoTool:
        return Reply()


def _identify(node: RemoteNode, on_line: OnLine, bring: bool) -> Reply[Identity]:
    try:
        reply = node.call(Identity, "node", "identify", on_line=on_line, bring=bring)
    except Interrupted:
        raise
    except Problem:
        # The verb meets it too, and reports it.
        return Reply()
    if reply.data:
        node.look = Look(machine=reply.data.machine, addresses=reply.data.addresses)
    return Reply()


def _unready(node: RemoteNode, ignored: Sequence[str]) -> list[Problem]:
    """The failed checks of a node; none counts where nothing is to be applied."""
    if not any(report.is_due for report in node.look.steps):
        return []
    bad = [check for check in node.look.preflight if check.verdict == "fail" and check.name not in ignored]
    return [PreflightFailed(f"not ready: {c.name}: {c.found}", hint=_hint(node, c.name, c.hint)) for c in bad]


def _hint(node: RemoteNode, check: str, hint: str) -> str:
    if check != "sudo":
        return hint
    user = node.look.user
    return (
        f"let {user} use sudo there without a password while the cluster is set up "
        f"(`sudo visudo -f /etc/sudoers.d/{user}`: `{user} ALL=(ALL) NOPASSWD: ALL`), "
        f"or run `sparkinstall multi-node` at the node itself"
    )


def _conflicts(node: RemoteNode) -> list[Problem]:
    """What would stop a phase, reported before hours are spent on the others.

    Services are left out: those of the workers wait for the head.
    """
    early = {step for phase in PHASES if not phase.services for step in phase.steps}
    problems = []
    for report in node.look.steps:
        if report.name not in early:
            continue
        # A missing password for sudo is reported by its own check.
        if report.problem and report.problem.code != "sudo":
            problems.append(report.problem)
        conflicts = (each for each in report.checked if isinstance(each, Conflict))
        problems += [Problem(f"{report.name}: {each.message}", hint=each.hint) for each in conflicts]
    return problems


def _not_proven(verified: Verified) -> Problem:
    steps = [report.name for report in verified.checks if report.is_due]
    probes = [each for each in verified.probes if each.verdict == "fail"]
    parts = [*steps, *(each.name for each in probes)]
    return Problem(
        f"drift: {', '.join(parts) or 'verify failed'}",
        cause="; ".join(f"{each.name}: {each.found}" for each in probes),
        hint="; ".join(dict.fromkeys(each.hint for each in probes if each.hint))
        or "`sparkinstall plan` on that node shows more",
    )
