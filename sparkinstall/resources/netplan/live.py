"""The QSFP port in netplan's files and in the kernel: addresses and MTU, changed under a rollback timer."""

import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

from msgspec import Struct

from sparkinstall.errors import Blocked, Interrupted, Problem
from sparkinstall.facts import ip, network, qsfp
from sparkinstall.node import Node
from sparkinstall.resources import Conflict, Drift, Ok, State, rollback
from sparkinstall.resources.netplan import files, networkd, pending, record
from sparkinstall.system import Reader, System, Undo, Undone, failure_of, undoes

TIMER = "network"
"""The name of its rollback timer."""

_PATIENCE = 40.0
"""Seconds for an applied network to settle; at most two thirds of the timer's."""
_UNDO = "netplan"


class _Plan(Struct, frozen=True, dict=True):
    """A snapshot of the node and its files, enough to check and to apply."""

    on: Reader
    node: Node

    @cached_property
    def halves(self) -> tuple[files.Half, ...]:
        names, mtu = qsfp.port_to_look_at(self.on, self.node).names, self.node.config.network.mtu
        own = network.own_addresses(self.node)
        return tuple(files.Half(name, address, mtu) for name, address in zip(names, own, strict=False))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(half.name for half in self.halves)

    @cached_property
    def read(self) -> tuple[files.NetplanFile, ...]:
        return files.read_all(self.on)

    @cached_property
    def claims(self) -> list[files.Claim]:
        return files.claims(self.read, self.names, files.devices(self.on, self.names))

    @cached_property
    def target(self) -> files.NetplanFile | None:
        return next((each for each in self.read if each.path == files.TARGET), None)

    @property
    def former(self) -> frozenset[str]:
        """Interfaces that an earlier run set up and that are no longer wanted."""
        return (self.target.formerly_ours if self.target else frozenset()) - set(self.names)

    @cached_property
    def wanted(self) -> dict[str, bytes | None]:
        """Every file that must change, with its new content; None: it is removed."""
        found: dict[str, bytes | None] = {}
        for file in {claim.file.path: claim.file for claim in self.claims}.values():
            if file.path != files.TARGET:
                taken = [(claim.kind, claim.id) for claim in self.claims if claim.file == file]
                found[file.path] = files.without(file, taken)
        if not self._target_is_right():
            found[files.TARGET] = self._target_content
        return found

    @cached_property
    def _target_content(self) -> bytes:
        mine = {claim.id for claim in self.claims if claim.file.path == files.TARGET}
        dropped = mine | set(self.target.formerly_ours if self.target else ())
        by = _renderer(self.on, self.read)
        return files.rendered(self.halves, by, self.target, dropped)

    def _target_is_right(self) -> bool:
        entry = self.on.entry(files.TARGET)
        whole = entry is not None and entry.kind == "file" and entry.mode == 0o600
        return whole and self.target is not None and self.target.content == self._target_content

    def obstacle(self) -> Conflict | None:
        looks = [self._not_to_be_taken, self._beside_netplan, self._twice_in_files]
        if not self.on.rehearsal:
            looks = [self._no_netplan, *looks, self._in_another, self._lan_live]
        return next((found for look in looks if (found := look())), None)

    def pending(self) -> Conflict | None:
        """Return why netplan rejects the files, or what an apply would change of other interfaces."""
        if self.on.rehearsal:
            return pending.rejected(self.on, self.read, self.wanted)
        return pending.pending(self.on, self.read, self.wanted, {*self.names, *self.former})

    def _no_netplan(self) -> Conflict | None:
        if self.on.entry(files.PROGRAM):
            return None
        return Conflict(
            "this node has no netplan",
            "install it (`sudo apt-get install netplan.io`), or set the links up yourself and set"
            " `network.manage: false`",
        )

    def _not_to_be_taken(self) -> Conflict | None:
        names = ", ".join(self.names)
        for claim in self.claims:
            if not claim.file.ours_to_change:
                return Conflict(
                    f"{claim.file.path} configures {names} (`{claim.id}`), and is recreated at every boot or upgrade",
                    f"remove `{claim.id}` where that file is generated, or hide it with an empty"
                    f" {files.OWN_FOLDER}/{claim.file.name}",
                )
            if claim.others:
                return Conflict(
                    f"`{claim.id}` in {claim.file.path} configures {names} together with {claim.others}",
                    f"make it match only the others (`sudoedit {claim.file.path}`), then run again",
                )
        for file, kind, name, part in files.made_of(self.read, {*self.names, *(claim.id for claim in self.claims)}):
            return Conflict(
                f"`{name}` ({kind}) in {file.path} contains {part}, an interface of the QSFP port",
                f"remove {part} from it (`sudoedit {file.path}`), or choose another with `network.interface`",
            )
        return None

    def _beside_netplan(self) -> Conflict | None:
        live = {} if self.on.rehearsal else ip.live(self.on)
        for device in files.devices(self.on, self.names):
            if device.name not in self.names:
                continue
            there = live.get(device.name) or ip.Live(
                device.name, 0, True, True, (), names=(device.name,), mac=device.mac
            )
            if self._networkd_reads and (path := networkd.overriding(self.on, there, device.driver)):
                return Conflict(
                    f"networkd would take {path} for {device.name} instead of netplan's file, or in addition to it",
                    f"remove it, or exclude {device.name} there (`sudoedit {shlex.quote(path)}`), then run again",
                )
            for program, path, remove in files.beside(self.on, device):
                return Conflict(
                    f"{program} {path} for {device.name} may override netplan's at boot",
                    f"remove it (`{remove}`), then run again",
                )
        return None

    @property
    def _networkd_reads(self) -> bool:
        by_files = _renderer(self.on, self.read) == "networkd"
        return by_files or (not self.on.rehearsal and "networkd" in pending.running(self.on))

    def _twice_in_files(self) -> Conflict | None:
        wanted = {str(half.address.ip) for half in self.halves}
        taken = {(claim.file.path, claim.kind, claim.id) for claim in self.claims}
        former = {(files.TARGET, "ethernets", name) for name in self.former}
        for file in self.read:
            for kind, name, fields in file.definitions():
                if (file.path, kind, name) not in taken | former and (both := wanted & _addresses_in(fields)):
                    return _in_use(min(both), f"`{name}` in {file.path} has it")
        return None

    def _in_another(self) -> Conflict | None:
        live = ip.live(self.on)
        for name in self.names:
            if name in live and (master := live[name].master):
                return Conflict(
                    f"{name} is a part of {master}, and netplan would remove it from there",
                    f"remove it yourself (`sudo ip link set {name} nomaster`), or choose another port with"
                    " `network.interface`",
                )
        return None

    def _lan_live(self) -> Conflict | None:
        ours = {*self.names, *self.former, "lo"}
        for name, there in qsfp.addresses(self.on).items():
            both = {str(half.address.ip) for half in self.halves} & {each.partition("/")[0] for each in there}
            if name not in ours and both:
                return _in_use(min(both), f"{name} has it")
        for route in ip.routes(self.on):
            for half in self.halves:
                if route.interface not in ours and route.to.prefixlen and route.to.overlaps(half.address.network):
                    return Conflict(
                        f"the subnet {half.address.network} of {half.name} is already in use: {route.interface} has"
                        f" a route to {route.to}",
                        "choose others with `cluster.head`, `cluster.workers` and `network.twin_subnet`",
                    )
        return None


def _in_use(address: str, by: str) -> Conflict:
    return Conflict(
        f"the address {address} is already in use: {by}",
        "choose another with `cluster.head`, `cluster.workers` or `cluster.address` (and `network.twin_subnet`)",
    )


def _addresses_in(fields: Mapping[str, Any]) -> set[str]:
    said = fields.get("addresses")
    # Each is a string, or a mapping from the string to its options.
    words = [next(iter(each), "") if isinstance(each, dict) else str(each) for each in said or ()]
    return {word.partition("/")[0] for word in words}


def _renderer(on: Reader, read: Sequence[files.NetplanFile]) -> str:
    """Return the renderer that the files name, unless only the other one runs."""
    said = files.renderer(read)
    if on.rehearsal or said not in pending.SERVICES:
        return said
    running = pending.running(on)
    return said if said in running or not running else running[0]


class Netplan(Struct, frozen=True):
    """netplan's files configure addresses and MTU of the QSFP port, and no other file does."""

    key: ClassVar[str] = f"netplan:{files.TARGET}"
    node: Node

    def check(self, on: Reader) -> State:
        plan = _Plan(on, self.node)
        try:
            if obstacle := plan.obstacle():
                return obstacle
        except files.BadFile as bad:
            return Conflict(bad.message, bad.hint)
        if not plan.wanted:
            return Ok(", ".join(plan.names))
        if edit := plan.pending():
            return edit
        # Raises if the port must not be changed.
        qsfp.used_port(on, self.node)
        before = {path: on.read(path) for path in plan.wanted}
        return Drift(_summary(plan), files.shown(before), files.shown(plan.wanted))

    def apply(self, on: System) -> None:
        plan = _Plan(on, self.node)
        files.generate(on, plan.read, plan.wanted)
        if on.rehearsal:
            _write(on, plan.wanted)
        else:
            _refuse_answered(on, plan)
            _guarded(on, plan, lambda: _write(on, plan.wanted))


def _summary(plan: _Plan) -> str:
    taken = sorted(path for path in plan.wanted if path != files.TARGET)
    also = f", replacing its definition in {', '.join(taken)}" if taken else ""
    spare = qsfp.unused_cable(plan.on, plan.node)
    unused = f" ({spare})" if spare else ""
    return f"set up {' and '.join(plan.names)} with MTU {plan.node.config.network.mtu} in {files.TARGET}{also}{unused}"


def _write(on: System, wanted: Mapping[str, bytes | None]) -> None:
    # Write ours first: a run killed in between leaves one file too many, not too few.
    for path in sorted(wanted, key=lambda each: each != files.TARGET):
        content, entry = wanted[path], on.entry(path)
        if content is None:
            on.remove(path)
        else:
            on.write(path, content, 0o600 if path == files.TARGET or entry is None else entry.mode)


class LiveLink(Struct, frozen=True):
    """The QSFP interfaces are up with the MTU and addresses in the file."""

    key: ClassVar[str] = "link:qsfp"
    node: Node

    def node_only(self, on: Reader) -> str:
        return f"applying it with netplan: {', '.join(map(str, _Plan(on, self.node).halves))}"

    def check(self, on: Reader) -> State:
        plan, now = _Plan(on, self.node), ip.live(on)
        halves = plan.halves
        if not all(each.is_live(now) for each in halves):
            if edit := plan.pending():
                return edit
            qsfp.used_port(on, self.node)
            before, after = "".join(f"{each.found(now)}\n" for each in halves), "".join(f"{each}\n" for each in halves)
            return Drift("apply the network", before, after)
        if rollback.armed(on, TIMER) and not self.node.confirm_later:
            return Drift("confirm the network that an earlier run left unconfirmed")
        return Ok()

    def apply(self, on: System) -> None:
        _guarded(on, _Plan(on, self.node), lambda: None)


def _refuse_answered(on: System, plan: _Plan) -> None:
    """Check that no other machine on the link has our address.

    Raises:
        Blocked: one has.
    """
    now = ip.live(on)
    for half in plan.halves:
        there = now.get(half.name)
        address = str(half.address.ip)
        if not there or not there.carrier or address in {each.partition("/")[0] for each in there.addresses}:
            continue
        if owner := _neighbour(on, half.name, address):
            found = _in_use(address, f"{owner} answers to it on {half.name}")
            raise Blocked(found.message, hint=found.hint)


def _neighbour(on: System, interface: str, address: str) -> str:
    """Return the MAC address of who answers to `address` on the cable, or an empty text."""
    # The kernel may remember an owner of long ago, so it has to ask again: that is what the ping is for.
    on.try_run("ip", "neighbour", "flush", "to", address, "dev", interface, root=True)
    network.ping(on, "-c", "1", "-I", interface, address)
    found = ip.asked(on, "neighbour", "show", "to", address, "dev", interface)
    return next((str(each.get("lladdr")) for each in found if "REACHABLE" in each.get("state", ())), "")


def _guarded(on: System, plan: _Plan, change: Callable[[], None]) -> None:
    """Change the network under a rollback timer; keep the change only if everything reachable before still is.

    Raises:
        Problem: the change was rolled back.
    """
    qsfp.used_port(on, plan.node)
    config, paths = plan.node.config.network, tuple(plan.wanted)
    ours = {*plan.names, *plan.former}
    theirs = record.taken(on, pending.configured(on, plan.read, plan.wanted, ours))
    before, reach = {**theirs, **record.taken(on, ours)}, network.reach(on, plan.node)
    added = {half.name: str(half.address) for half in plan.halves}
    undo = Undo(_UNDO, "the QSFP link", {name: was for name, was in before.items() if name in ours}, added)
    rollback.arm(on, TIMER, undo, record.restoring(before, added), config.rollback_seconds, paths)
    until = time.monotonic() + min(_PATIENCE, config.rollback_seconds * 2 / 3)
    try:
        change()
        # networkd removes rules that no file names, for one.
        on.run("sh", "-ec", record.restoring(theirs, {}), timeout=120, root=True)
        _settle(on, plan, reach, theirs, until)
    except (Problem, OSError) as problem:
        raise rolled_back(on, problem, before, added) from problem
    if not plan.node.confirm_later:
        try:
            rollback.disarm(on, TIMER)
        except rollback.RolledBack as late:
            # The timer may even have been faster than the change.
            raise rolled_back(on, late, before, added) from late


def _settle(on: Reader, plan: _Plan, reach: network.Reach, theirs: Mapping[str, Any], until: float) -> None:
    """Wait until the links are up, everything that answered before answers again, and others' interfaces are as
    recorded."""
    while problem := (
        _unsettled(on, plan)
        or network.lost(reach, on, plan.node)
        or ", ".join(record.differences(theirs, on, {}, soft=False))
    ):
        if time.monotonic() > until:
            raise Problem(
                f"the new network was not kept: {problem}",
                hint="check the cable and `journalctl -u systemd-networkd -u NetworkManager`, then run again",
            )
        time.sleep(0.5)


def _unsettled(on: Reader, plan: _Plan) -> str:
    now = ip.live(on)
    return next((each.found(now) for each in plan.halves if not each.is_live(now)), "")


def rolled_back(on: System, problem: Exception, before: Mapping[str, Any], added: Mapping[str, str]) -> Problem:
    """Roll back now, without waiting for the timer; return the problem with what is live then."""
    later, hint = "the former network is restored when the timer expires", getattr(problem, "hint", "")
    try:
        became = later
        if rollback.fire(on, TIMER):
            became = "the former network was restored"
            if missing := record.awaited(before, on, added):
                became = f"not the whole former network was restored: {'; '.join(missing)}"
                hint = f"restore the rest with the commands in parentheses; {hint}"
    except Interrupted:
        return Interrupted(f"interrupted; {later}", hint="wait for that, then run the same command again")
    if not isinstance(problem, Problem):
        return Problem(f"{problem}; {became}", hint=hint)
    said = Problem(
        f"{problem.message}; {became}", cause=problem.cause, hint=hint, log=problem.log, output=problem.output
    )
    said.code = problem.code
    return said


@undoes(_UNDO, after=lambda _: f"{files.OWN_FOLDER}/")
def restore(records: Sequence[Undo], on: System) -> Undone:
    """Apply the restored files, and give the interfaces their former MTU and addresses.

    Raises:
        CommandFailed: netplan failed.
        Blocked: this ssh session uses an address that would be removed, or netplan would change other interfaces.
        Problem: something of the former network is missing, or `ip` does not show it.
    """
    subject = records[0].subject
    if on.rehearsal:
        return Undone(subject, "nothing")
    before, added = _first_of(records)
    if not on.entry(files.PROGRAM):
        return _without_netplan(on, subject, before, added)
    read = files.read_all(on)
    _refuse_own_way(read, before, added)
    if edit := pending.pending(on, read, {}, before):
        raise Blocked(edit.message, hint=edit.hint)
    rollback.drop(on, TIMER)
    kept = {name for name, address in added.items() if _still_named(read, address) and name in before}
    # A card that was removed since has nothing to restore.
    there = record.taken(on, before)
    wanted = {name: was for name, was in before.items() if name not in kept and name in there}
    wanted |= record.taken(on, pending.configured(on, read, {}, before))
    answer = on.try_run("sh", "-ec", record.restoring(wanted, added), timeout=120, root=True)
    if not answer.ok:
        hint = "check the files in /etc/netplan, then run the same command again"
        raise failure_of(answer, "`netplan apply` failed", hint=hint, log=on.log, places=("/etc/netplan", "/run"))
    if missing := record.awaited(wanted, on, added, soft=False):
        hint = "restore the rest with the commands in parentheses, and run `sparkinstall uninstall` again"
        raise Problem(f"not the whole former network was restored: {'; '.join(missing)}", hint=hint)
    return Undone(subject, "restored")


def _without_netplan(on: System, subject: str, before: Mapping[str, Any], added: Mapping[str, str]) -> Undone:
    """Raise Blocked if the former network is not live: without netplan nothing removes what it made of our file."""
    rollback.drop(on, TIMER)
    there = record.taken(on, before)
    if record.differences({name: was for name, was in before.items() if name in there}, on, added, soft=False):
        raise Blocked(
            "the former network cannot be restored: netplan is no longer installed",
            hint="install it (`sudo apt-get install netplan.io`), and run `sparkinstall uninstall` again",
        )
    return Undone(subject, "nothing")


def _refuse_own_way(read: Sequence[files.NetplanFile], before: Mapping[str, Any], added: Mapping[str, str]) -> None:
    """Raise Blocked if this ssh session uses an address that would be removed."""
    own = dict.fromkeys(qsfp.session()[2:3])
    for name, address in added.items():
        had = {each.split()[0].partition("/")[0] for each in before.get(name, {}).get("addresses", ())}
        ip = address.partition("/")[0]
        if ip in own and ip not in had and not _still_named(read, address):
            raise Blocked(
                f"{name} was kept: this ssh session uses its address {ip}, which would be removed",
                hint="log in over another interface, and run `sparkinstall uninstall` again",
            )


def _first_of(records: Iterable[Undo]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the state of each interface before the first change, and the address set last."""
    before: dict[str, Any] = {}
    added: dict[str, str] = {}
    for undo in records:
        for name, was in undo.before.items():
            before.setdefault(name, was)
        added.update(undo.after)
    return before, added


def _still_named(read: Sequence[files.NetplanFile], address: str) -> bool:
    """Return whether a kept file, changed by someone else, still configures this address."""
    said = [fields for file in read for _, _, fields in file.definitions()]
    return any(address.partition("/")[0] in _addresses_in(fields) for fields in said)
