"""Several nodes, phase by phase: all of them side by side, and nobody goes on before all have come as far."""

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from msgspec import Struct, field
from msgspec.structs import replace

from sparkinstall.cluster import artifacts, bandwidth, differences, sameness
from sparkinstall.cluster.bandwidth import Between, Measurement
from sparkinstall.cluster.differences import Comparison
from sparkinstall.cluster.handover import Handover
from sparkinstall.cluster.remote import Member, NoTool, OnLine, RemoteNode, Reply, assignments, repeated
from sparkinstall.config import Config
from sparkinstall.errors import BadUsage, Interrupted, PreflightFailed, Problem
from sparkinstall.members import require_sound
from sparkinstall.probes import LEVELS, Level
from sparkinstall.probes import bandwidth as bandwidth_probes
from sparkinstall.system import processes

Outcome = Literal["unchanged", "changed", "failed", "blocked"]
Targets = Literal["all", "head", "workers"]


class Phase(Struct, frozen=True):
    """Steps that are done between two barriers, and on which nodes."""

    name: str
    steps: tuple[str, ...]
    whom: Targets = "all"


_BUILDS = ("environment", "nccl", "nccl-fit", "fp8")
_SERVICES = ("env-files", "ray", "serving")
PHASES = (
    Phase("packages", ("packages",)),
    # Before the builds: what one node has built goes to the others over the fast link.
    Phase("network", ("network", "firewall")),
    Phase("head builds", _BUILDS, "head"),
    Phase("worker builds", _BUILDS, "workers"),
    Phase("head", _SERVICES, "head"),
    Phase("workers", _SERVICES, "workers"),
)


class Started(Struct, frozen=True):
    host: str
    phase: str


class Line(Struct, frozen=True):
    """One line that a node said."""

    host: str
    phase: str
    text: str


class Done(Struct, frozen=True):
    """What became of a phase on one node. `seconds` is wall time."""

    host: str
    phase: str
    outcome: Outcome
    seconds: float = 0.0
    data: Mapping[str, Any] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()


Tell = Callable[[Started | Line | Done], None]
Work = Callable[[RemoteNode, OnLine], Reply]


class ClusterOptions(Struct, frozen=True):
    """What is wanted of all nodes: settings by name, and the choices of the command line.

    `level`, `measure`: how far `verify` goes, as one node's own has it.
    """

    config: Config
    settings: Mapping[str, Any]
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    level: Level | None = None
    measure: bool = False


def members(hosts: Sequence[str], config: Config) -> tuple[Member, ...]:
    """The hosts as nodes: the first is the head, the others are the workers in their order.

    Raises:
        BadUsage: a host is named twice or cannot be one, or the subnet has no more addresses.
        BadConfig: the addresses cannot be a cluster's.
    """
    for host in hosts:
        if hosts.count(host) > 1:
            raise BadUsage(f"{host} is named twice", hint="name every node once, the head first")
        if host.startswith("-") or not host.isprintable() or any(c.isspace() for c in host) or not host:
            raise BadUsage(f"{host!a} cannot be a host", hint="write it as you would after `ssh`")
    if len(hosts) == 1:
        return (Member(hosts[0], "single", 0, config.cluster.head),)
    workers = _workers(config, len(hosts) - 1)
    require_sound(replace(config, cluster=replace(config.cluster, role="head", address=None, workers=workers)))
    addresses = (config.cluster.head, *workers)
    roles = ("head", *["worker"] * (len(hosts) - 1))
    return tuple(
        Member(h, role, rank, a) for rank, (h, role, a) in enumerate(zip(hosts, roles, addresses, strict=True))
    )


def _workers(config: Config, count: int) -> tuple[str, ...]:
    """The workers' addresses; those that the config does not name follow the highest that it does."""
    from ipaddress import IPv4Address, IPv4Interface

    known = config.cluster.workers[:count]
    named = [IPv4Address(each) for each in (config.cluster.head, *known)]
    link = IPv4Interface(f"{config.cluster.head}/{config.network.prefix_length}").network
    further = [max(named) + n for n in range(1, count - len(known) + 1)]
    if further and further[-1] >= link.broadcast_address:
        raise BadUsage(
            f"{link} has no more addresses after {max(named)} for {len(further)} further nodes",
            hint="name all of them with `cluster.workers`",
        )
    return (*known, *(str(each) for each in further))


class Barrier(Problem):
    """Some nodes failed, so none goes on."""


class Cluster(Struct):
    """The nodes of one command line; the head is the first. `done` is what each phase came to, in order.

    `pause` puts away what `tell` shows, so that something else can be said.
    """

    fars: Sequence[RemoteNode]
    wish: ClusterOptions
    tell: Tell
    pause: Callable[[], None] = lambda: None
    done: list[Done] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return any(each.outcome == "failed" for each in self.done)

    def of(self, far: RemoteNode) -> list[Done]:
        """What became of each phase on this node."""
        return [each for each in self.done if each.host == far.host]

    # --- what is said to a node

    def words(self, far: RemoteNode) -> list[str]:
        """The settings that make this node what it is, as options."""
        mine: dict[str, Any] = {**self.wish.settings, "cluster.role": far.member.role}
        if far.member.role != "single":
            mine["cluster.head"] = self.fars[0].member.address
            mine["cluster.workers"] = tuple(each.member.address for each in self.fars[1:])
            mine["cluster.address"] = far.member.address
        return assignments(mine)

    def _set_up(self, far: RemoteNode, steps: Sequence[str], on_line: OnLine, token: str = "") -> Reply:
        argv = ["all"] if far.member.role == "single" else ["multi-node", "--role", far.member.role]
        if far.member.role != "single" and "network" in steps:
            argv.append("--leave-armed")
        if token:
            argv += ["--token-file", "-"]
        argv += [*self.words(far), *repeated("--only", steps), *repeated("--ignore", self.wish.ignore), "--yes"]
        said = far.call(*argv, on_line=on_line, given=token)
        far.changed |= bool(said.data.get("changed"))
        return said

    # --- the phases

    def look(self) -> None:
        """Bring the tool, and learn how every node stands; nothing but the tool is touched."""
        self._at_once("look", self.fars, self._look)
        self._require_known_checks()

    def require_ready(self) -> None:
        """Raises Barrier where a node could not be asked, or cannot be set up; that is said of all of them."""
        for far in self.fars:
            self._judge(far)
        self._barrier()

    def _look(self, far: RemoteNode, on_line: OnLine) -> Reply:
        chosen = [*repeated("--only", self.wish.only), *repeated("--skip", self.wish.skip)]
        said = far.call("node", "look", *self.words(far), *chosen, on_line=on_line)
        far.look = said.data
        return said

    def _require_known_checks(self) -> None:
        from sparkinstall.core.catalogue import require_known

        known = [check["name"] for far in self.fars for check in far.look.get("preflight", ())]
        if known:
            require_known(self.wish.ignore, known, "check")

    def _judge(self, far: RemoteNode) -> None:
        """Say of a node that could be asked why it cannot be set up."""
        problems = [*_unready(far, self.wish.ignore), *_in_the_way(far)]
        if problems and far.look:
            at = next(n for n, each in enumerate(self.done) if each.host == far.host and each.phase == "look")
            before = self.done[at]
            self.done[at] = Done(far.host, "look", "failed", before.seconds, before.data, tuple(problems))
            self.tell(self.done[at])

    def up(self) -> None:
        """Everything that `look` found missing, with a barrier after each phase, and then the proof.

        Raises:
            Barrier: a node failed; the others have come as far as the barrier.
        """
        for phase in PHASES:
            fars = [far for far in self._whom(phase.whom) if self._steps(far, phase)]
            if not fars:
                continue
            if phase.name == "head":
                self._require_same()
            due = [far for far in fars if self._is_due(far, phase)]
            if phase.name == "worker builds":
                self._copy(due)
            self._rest([far for far in fars if far not in due], phase.name)
            self._do(phase, due)
            self._barrier()
        self.verify()
        self._barrier()

    def _whom(self, whom: Targets) -> Sequence[RemoteNode]:
        return {"all": self.fars, "head": self.fars[:1], "workers": self.fars[1:]}[whom]

    def _steps(self, far: RemoteNode, phase: Phase) -> list[str]:
        """Those steps of the phase that this node has and that were chosen."""
        there = {each["step"] for each in far.look["steps"]}
        return [step for step in phase.steps if step in there]

    def _is_due(self, far: RemoteNode, phase: Phase) -> bool:
        """What an earlier phase has changed may have undone what the look had found."""
        if far.changed or (phase.steps is _SERVICES and far.look.get("unproven")):
            return True
        if phase.name == "workers" and far.look.get("token") != self.fars[0].look.get("token"):
            return True
        if phase.name == "network" and far.look.get("armed"):
            # A killed run left it unconfirmed: it is as it should be, but not for long.
            return True
        mine = [each for each in far.look["steps"] if each["step"] in phase.steps]
        return any(each["outcome"] not in ("unchanged", "node_only") for each in mine)

    def _do(self, phase: Phase, due: Sequence[RemoteNode]) -> None:
        if not due:
            return
        token = self._token() if phase.name == "workers" and "ray" in self._steps(due[0], phase) else ""
        self._at_once(phase.name, due, lambda far, on_line: self._set_up(far, self._steps(far, phase), on_line, token))
        if phase.name == "network" and not self.failed and len(self.fars) > 1:
            self._confirm(due)

    def _copy(self, due: Sequence[RemoteNode]) -> None:
        """What the head has downloaded and built goes into the caches of those that would do the same again."""
        lacking = {far.host: [s for s in self._drifted(far) if s in artifacts.STEPS] for far in due}
        steps = [step for step in artifacts.STEPS if any(step in each for each in lacking.values())]
        workers = [far for far in due if lacking[far.host]]
        if workers:
            head = self.fars[0]
            self._at_once("copy", [head, *workers], Handover(head, workers, steps, self.words).work)

    def _drifted(self, far: RemoteNode) -> list[str]:
        return [each["step"] for each in far.look["steps"] if each["outcome"] not in ("unchanged", "node_only")]

    def _confirm(self, due: Sequence[RemoteNode]) -> None:
        """Keep the new network only once every node was reached anew, and has reached all others over the link."""
        self._at_once("reach", due, self._reach)
        # The nodes put their former networks back by themselves: not confirming is all it takes.
        self._barrier()
        self._at_once("confirm", due, lambda far, on_line: far.call("node", "confirm", on_line=on_line))

    def _reach(self, far: RemoteNode, on_line: OnLine) -> Reply:
        others = [each.member.address for each in self.fars if each is not far]
        return far.call("node", "reach", *others, *self.words(far), on_line=on_line, anew=True)

    def _require_same(self) -> None:
        """Raises Barrier where Python, vLLM, torch, Ray or NCCL are not the same on all nodes."""
        stale = [far for far in self.fars if far.changed]
        if stale:
            self._at_once("compare", stale, self._look)
            self._barrier()
            for far in stale:
                far.changed = False
        try:
            sameness.require_same([(far.host, far.look.get("versions", {})) for far in self.fars])
        except Problem as problem:
            self._add(Done(self.fars[0].host, "compare", "failed", problems=(problem,)))
            self._barrier()

    def _token(self) -> str:
        """The head's Ray token, which goes from its stdout to the workers' stdin and nowhere else."""
        if self.fars[0].look.get("executor") != "ray":
            return ""
        said: list[Reply] = []

        def ask(far: RemoteNode, on_line: OnLine) -> Reply:
            said.append(far.call("node", "token", *self.words(far), on_line=on_line))
            return Reply(said[0].code, {}, said[0].problems)

        self._at_once("token", self.fars[:1], ask)
        self._barrier()
        return str(said[0].data["token"])

    def verify(self) -> None:
        """Every check and every probe, on every node."""
        self._at_once("verify", self.fars, self._verify)

    def _verify(self, far: RemoteNode, on_line: OnLine) -> Reply:
        wish = self.wish
        chosen = [*repeated("--only", wish.only), *repeated("--skip", wish.skip)]
        chosen += [*(["--level", wish.level] if wish.level else []), *(["--measure"] if wish.measure else [])]
        said = far.call("verify", *self.words(far), *chosen, on_line=on_line)
        return said if said.problems or not said.code else Reply(said.code, said.data, (_not_proven(said),))

    def compare(self) -> Comparison | None:
        """What the nodes that `verify` has asked differ in; None where there are no two to be compared."""
        asked = [(done.host, done.data["comparables"]) for done in self.done if done.data.get("comparables")]
        if len(asked) < 2 or LEVELS.index(self.wish.level or LEVELS[-1]) < LEVELS.index("cluster"):
            return None
        found = differences.compared(asked)
        if found.failed:
            names = ", ".join(row.name for row in found.failed)
            mends = "; ".join(dict.fromkeys(f"{row.name}: {row.hint}" for row in found.failed))
            self.fail(self.fars[0].host, "compare", Problem(f"the nodes have not the same {names}", hint=mends))
        return found

    def measure(self) -> list[Between]:
        """The bandwidth between the head and each worker, one measurement after the other."""
        if len(self.fars) < 2:
            return []
        self._at_once("ready", self.fars, self._measurable)
        why = {done.host: done.data.get("why_not", {}) for done in self.done if done.phase == "ready"}
        head, kinds = self.fars[0], bandwidth_probes.kinds(self.wish.config.network.transport)
        found: list[Between] = []
        for worker, kind in ((worker, kind) for worker in self.fars[1:] for kind in kinds):
            out = bandwidth.left_out(head, worker, kind, why)
            found += [out] if out else [self._between(*way, kind) for way in bandwidth.ways(head, worker, kind)]
        return found

    def _measurable(self, far: RemoteNode, on_line: OnLine) -> Reply:
        return far.call("node", "measurable", *self.words(far), on_line=on_line)

    def _between(self, asking: RemoteNode, responding: RemoteNode, kind: bandwidth_probes.Kind) -> Between:
        started, one = time.monotonic(), Measurement(asking, responding, kind, self.words)
        self._at_once(bandwidth_probes.probe_name(kind), (asking, responding), one.work)
        hosts = asking.host, responding.host
        finding = bandwidth_probes.judged(one.result, self.wish.config.network.transport)
        if finding.verdict == "fail":
            said = f"{bandwidth_probes.probe_name(kind)} to {responding.host}: {finding.found}"
            self.fail(asking.host, "measure", Problem(said, hint=finding.hint))
        return Between(hosts, kind, finding, time.monotonic() - started, one.result)

    def fail(self, host: str, phase: str, problem: Problem) -> None:
        """Note what is wrong though the node itself has not said so."""
        self.done.append(Done(host, phase, "failed", problems=(problem,)))

    def status(self) -> None:
        """What is installed where."""
        self._at_once("status", self.fars, lambda far, on_line: _as_it_is(far, on_line, "status"))

    def uninstall(self) -> None:
        """Take everything back, the workers first: the head is what they hold on to.

        Raises:
            Barrier: a worker failed; the head was left as it is.
        """
        for fars in (self.fars[1:], self.fars[:1]):
            self._at_once("uninstall", fars, lambda far, on_line: _as_it_is(far, on_line, "uninstall", "--yes"))
            self._barrier()

    # --- side by side

    def _at_once(self, phase: str, fars: Sequence[RemoteNode], work: Work) -> None:
        from concurrent.futures import ThreadPoolExecutor

        stop = threading.Event()
        if not fars:
            return
        with ThreadPoolExecutor(max_workers=len(fars)) as pool:
            try:
                for future in [pool.submit(self._one, phase, far, work, stop) for far in fars]:
                    self.done.append(future.result())
            except BaseException:
                stop.set()
                processes.stop_all()
                raise

    def _one(self, phase: str, far: RemoteNode, work: Work, stop: threading.Event) -> Done:
        if stop.is_set():
            return Done(far.host, phase, "blocked")
        self.tell(Started(far.host, phase))
        started = time.monotonic()
        done = _judged(far, phase, work, lambda text: self.tell(Line(far.host, phase, text)), started)
        self.tell(done)
        return done

    def _rest(self, fars: Iterable[RemoteNode], phase: str) -> None:
        for far in fars:
            self._add(Done(far.host, phase, "unchanged"))

    def _add(self, done: Done) -> None:
        self.done.append(done)
        self.tell(done)

    def _barrier(self) -> None:
        bad = sorted({each.host for each in self.done if each.outcome == "failed"})
        if bad:
            raise Barrier(f"stopped: {', '.join(bad)}")


def _as_it_is(far: RemoteNode, on_line: OnLine, *argv: str) -> Reply:
    """Ask the tool that is there, of whichever version; where there is none there is nothing."""
    try:
        return far.call(*argv, on_line=on_line, bring=False)
    except NoTool:
        return Reply(0, {}, ())


def _judged(far: RemoteNode, phase: str, work: Work, on_line: OnLine, started: float) -> Done:
    try:
        said = work(far, on_line)
    except Interrupted:
        raise
    except Problem as problem:
        return Done(far.host, phase, "failed", time.monotonic() - started, problems=(problem,))
    seconds = time.monotonic() - started
    if said.problems or said.code:
        problems = said.problems or (Problem(f"`{phase}` ended with {said.code} and did not say why"),)
        return Done(far.host, phase, "failed", seconds, said.data, problems)
    outcome: Outcome = "changed" if said.data.get("changed") else "unchanged"
    return Done(far.host, phase, outcome, seconds, said.data)


def _unready(far: RemoteNode, ignored: Sequence[str]) -> list[Problem]:
    """The checks that failed; nothing to be done is nothing to be ready for."""
    if all(step["outcome"] in ("unchanged", "node_only") for step in far.look.get("steps", ())):
        return []
    bad = [c for c in far.look.get("preflight", ()) if c["verdict"] == "fail" and c["name"] not in ignored]
    return [PreflightFailed(f"not ready: {c['name']}: {c['found']}", hint=_hint(far, c)) for c in bad]


def _hint(far: RemoteNode, check: Mapping[str, Any]) -> str:
    if check["name"] == "sudo":
        user = far.look.get("user", "USER")
        return (
            f"let {user} use sudo there without a password while the cluster is set up "
            f"(`sudo visudo -f /etc/sudoers.d/{user}`: `{user} ALL=(ALL) NOPASSWD: ALL`), "
            f"or run `sparkinstall multi-node` at the node itself"
        )
    return str(check["hint"])


def _in_the_way(far: RemoteNode) -> list[Problem]:
    """What stands in the way of a phase, said before hours are spent on the others.

    What the services meet is left out: the workers' ones wait for the head.
    """
    early = {step for phase in PHASES if phase.steps is not _SERVICES for step in phase.steps}
    problems = []
    for step in far.look.get("steps", ()):
        if step["step"] not in early:
            continue
        # That sudo asks for a password is a check of its own, and said there.
        if step["error"] and step["error"].get("code") != "sudo":
            problems.append(Problem(step["error"]["message"], cause=step["error"]["cause"], hint=step["error"]["hint"]))
        for resource in step["resources"]:
            if resource["state"] == "conflict":
                problems.append(Problem(f"{step['step']}: {resource['message']}", hint=resource["hint"]))
    return problems


def _not_proven(said: Reply) -> Problem:
    steps = [s["step"] for s in said.data.get("checks", ()) if s["outcome"] not in ("unchanged", "node_only")]
    probes = [p for p in said.data.get("probes", ()) if p["verdict"] == "fail"]
    parts = [*steps, *(probe["name"] for probe in probes)]
    return Problem(
        f"not as it should be: {', '.join(parts) or 'verify says no'}",
        cause="; ".join(f"{probe['name']}: {probe['found']}" for probe in probes),
        hint="; ".join(dict.fromkeys(p["hint"] for p in probes if p["hint"])) or "`sparkinstall plan` there shows more",
    )
