"""The node's firewall: an nftables table that restricts Ray, NCCL and the API to the QSFP link.

RDMA traffic bypasses it, because it bypasses the kernel.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import IPv4Interface, IPv4Network
from typing import Any, ClassVar

from msgspec import Struct

from sparkinstall import ray_ports
from sparkinstall.errors import NeedsRoot, Problem
from sparkinstall.facts import ip, network, qsfp
from sparkinstall.facts.changes import is_ours
from sparkinstall.facts.packet_filters import NFT, TABLE, another
from sparkinstall.layout import FIREWALL_UNIT
from sparkinstall.node import Node
from sparkinstall.resources import Conflict, Drift, Ok, State, Unknown, rollback
from sparkinstall.resources.files import File
from sparkinstall.resources.template import render
from sparkinstall.system import Reader, Result, System, Undo, Undone, failure_of, undoes

TIMER = "firewall"
"""The name of its rollback timer."""
UNDO = "nftables"
"""The kind of undo record that `delete_table` handles."""

_NAME = " ".join(TABLE)
_IN_KERNEL = "/sys/module/nf_tables"
"""Exists if the kernel may have tables."""
_SSHD = "/usr/sbin/sshd"
_PORT_SETTING = re.compile(r"^port (\d+)$", re.MULTILINE)
_LISTENING = re.compile(r":(\d+)\s+\S+\s+users:.*\"(?:sshd|dropbear)\"")
_SOCKET = re.compile(r"^Listen=\S*?(\d+) \(Stream\)$", re.MULTILINE)

# In a namespace that ends with the shell: nft's listing of the rules, without loading them on this node.
_TRY = f'"{NFT}" "$1" && "{NFT}" -nn list table {_NAME}'
# The rollback timer runs this after it has restored the former file, or removed ours.
_RESTORE = f"""\
{NFT} delete table {_NAME}
if [ -e {{path}} ]; then {NFT} -f {{path}}; else systemctl disable {FIREWALL_UNIT}; systemctl stop {FIREWALL_UNIT}; fi
"""


def rules(node: Node, on: Reader) -> str:
    """Return the rules for nft on this node.

    Raises:
        LinkProblem: the QSFP port cannot be determined.
        Problem: finding sshd's ports needs root.
    """
    return render("firewall.nft.j2", {"path": node.firewall_rules, **_values(node, on)}).decode()


def _values(node: Node, on: Reader) -> Mapping[str, Any]:
    allow, api = node.config.serving.allow, node.config.serving.port
    closed = [(api, api), *(ports_between_nodes(node) if node.several else ())]
    return {
        "ssh": [str(port) for port in ssh_ports(on)],
        "names": "{ " + ", ".join(f'"{name}"' for name in _interfaces(node, on)) + " }",
        "link": "{ " + ", ".join(map(str, subnets(node))) + " }" if node.several else "",
        "interfaces": node.several,
        "allow": str(IPv4Network(allow)) if allow else "",
        "api": api,
        "closed": merged(closed),
    }


def subnets(node: Node) -> tuple[IPv4Network, ...]:
    """Return the subnets of both halves of the QSFP port."""
    settings = node.config.network
    bases = (node.config.cluster.head, settings.twin_subnet)
    return tuple(IPv4Interface(f"{base}/{settings.prefix_length}").network for base in bases)


def merged(ranges: Iterable[tuple[int, int]]) -> list[str]:
    """Return port ranges as nft accepts them in a set: sorted and without overlap."""
    found: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if found and first <= found[-1][1] + 1:
            found[-1] = found[-1][0], max(last, found[-1][1])
        else:
            found.append((first, last))
    return [f"{first}-{last}" if last > first else str(first) for first, last in found]


def ssh_ports(on: Reader) -> tuple[int, ...]:
    """Return the ports where sshd is configured to listen and does listen, and 22.

    Raises:
        Problem: it needs root.
    """
    if on.rehearsal:
        return (22,)
    listening = on.ask("ss", "-Hltnp", root=True)
    if not listening.ok:
        raise _unreadable(listening)
    settings = on.ask(_SSHD, "-T", root=True).out
    sockets = on.ask("systemctl", "show", "-p", "Listen", "ssh.socket", "sshd.socket").out
    found = _LISTENING.findall(listening.out) + _PORT_SETTING.findall(settings) + _SOCKET.findall(sockets)
    return tuple(sorted({22, *map(int, found)}))


def _unreadable(answer: Result) -> Problem:
    hint = "run the command that failed by hand as root: it says why"
    return failure_of(answer, "the firewall cannot be read", hint=hint, error=NeedsRoot)


def _interfaces(node: Node, on: Reader) -> tuple[str, ...]:
    """Return the halves of the QSFP port, whose names are letters and digits; () on a single node."""
    return qsfp.port_to_look_at(on, node).names if node.several else ()


def left_to(node: Node, on: Reader) -> str:
    """Return what to configure by hand in another active firewall, if the settings leave the node to it; else "".

    A table of ours that is already loaded stays: a firewall installed later does not open what we closed.
    """
    asks = node.config.firewall.mode == "auto" and on.entry(node.firewall_rules) is None
    other = another(on) if asks else ""
    if not other:
        return ""
    api, allow = node.config.serving.port, node.config.serving.allow
    api_words = f"TCP port {api} to " + (f"{allow} only" if allow else "no one else")
    if not node.several:
        return f"{other} is active (firewall.mode: auto): use it to open {api_words}"
    names, link = " and ".join(_interfaces(node, on)), " and ".join(map(str, subnets(node)))
    closed = ", ".join(merged(ports_between_nodes(node)))
    return (
        f"{other} is active (firewall.mode: auto): use it to accept {link} on {names}, to block TCP ports {closed} and "
        f"everything sent to {link} on every other interface, and to open {api_words}"
    )


class RulesFile(Struct, frozen=True):
    """The file of the rules. nft validates them before they are written."""

    node: Node

    @property
    def key(self) -> str:
        return f"file:{self.node.firewall_rules}"

    def check(self, on: Reader) -> State:
        return self._file(on).check(on)

    def _file(self, on: Reader) -> File:
        return File(self.node.firewall_rules, rules(self.node, on).encode())

    def apply(self, on: System) -> None:
        file = self._file(on)
        if not on.rehearsal:
            as_nft_lists(on, file.content.decode())
            # Record the former file before replacing it: a rollback restores it.
            _arm(on, self.node)
        file.apply(on)


class LiveTable(Struct, frozen=True):
    """The kernel has exactly these rules. A change is rolled back if the node becomes unreachable."""

    key: ClassVar[str] = f"nftables:{_NAME}"
    node: Node

    def node_only(self, on: Reader) -> str:
        return f"loading the rules; {_rehearsed(on, rules(self.node, on))}"

    def check(self, on: Reader) -> State:
        if on.entry(NFT) is None:
            return Unknown("packages")
        live, wanted = live_table(on), rules(self.node, on)
        if live and not is_ours(on, _NAME):
            return Conflict(
                f"the table {_NAME} is loaded, but not by sparkinstall: the journal has no record of it",
                f"delete it (`sudo nft delete table {_NAME}`) where it is made, or set `firewall.mode: off`",
            )
        if on.read(self.node.firewall_rules) != wanted.encode():
            return Drift("load the firewall's changed rules" if live else "load the firewall's rules")
        listed = as_nft_lists(on, wanted)
        if live == listed:
            waits = rollback.armed(on, TIMER) and not self.node.confirm_later
            return Drift("confirm the firewall that an earlier run loaded") if waits else Ok(f"table {_NAME}")
        return Drift(f"load the firewall's rules{' again: they were changed' if live else ''}", live, listed)

    def apply(self, on: System) -> None:
        gateways = [each.gateway for each in ip.routes(on) if each.gateway and not each.to.prefixlen]
        before = network.reach(on, self.node, [*gateways, *(self.node.peers if self.node.several else ())])
        table = live_table(on)
        _arm(on, self.node)
        on.run(NFT, "-f", self.node.firewall_rules, root=True)
        if lost := network.lost(before, on, self.node):
            hint = "set `firewall.mode: off` in the config if this node cannot use them, or report this"
            raise _put_back(on, Problem(f"after loading the firewall's rules, {lost}", hint=hint), table)
        if not self.node.confirm_later:
            try:
                rollback.disarm(on, TIMER)
            except rollback.RolledBack as late:
                raise _put_back(on, late, table) from late


def _put_back(on: System, why: Problem, table: str) -> Problem:
    """Roll back now; return the problem with what is loaded then, compared with the former `table`."""
    back = "will be restored within minutes"
    if rollback.fire(on, TIMER):
        back = "are restored" if live_table(on) == table else f"are not (`sudo nft list table {_NAME}` shows those now)"
    said = Problem(f"{why.message}; the former rules {back}", hint=why.hint)
    said.code = why.code
    return said


def _arm(on: System, node: Node) -> None:
    path = node.firewall_rules
    undo, seconds = Undo(UNDO, _NAME, {"kind": "absent"}, {"kind": "table"}), node.config.network.rollback_seconds
    rollback.arm(on, TIMER, undo, _RESTORE.format(path=path), seconds, keep=(path,))


def live_table(on: Reader) -> str:
    """Return nft's listing of our table in the kernel; "" if there is none.

    Raises:
        Problem: it needs root.
    """
    tables = on.ask(NFT, "list", "tables", root=True)
    if not tables.ok:
        raise _unreadable(tables)
    if f"table {_NAME}" not in tables.out.splitlines():
        return ""
    return on.ask(NFT, "-nn", "list", "table", *TABLE, root=True).out


def as_nft_lists(on: Reader, text: str) -> str:
    """Load `text` in a separate network namespace and return nft's listing of it.

    Raises:
        Problem: nft rejects it.
    """
    answer = on.ask("unshare", "--net", "sh", "-c", _TRY, "sh", text, root=True)
    if not answer.ok:
        raise Problem(
            "nft rejected the firewall's rules; nothing was loaded",
            cause=answer.err.strip()[-300:],
            hint="check that the kernel supports nf_tables (`sudo nft list tables`); if it does, report this",
        )
    return answer.out


def _rehearsed(on: Reader, text: str) -> str:
    """Validate the rules with this machine's nft; return the result in words.

    Raises:
        Problem: nft rejects them.
    """
    alone = on.ask("unshare", "--map-root-user", "--net", NFT, "list", "tables")
    if alone.code == 127 or "No such file" in alone.err:
        return "not validated here: nft is not installed"
    if not alone.ok:
        return "not validated here: nft needs root or a user namespace"
    answer = on.ask("unshare", "--map-root-user", "--net", NFT, "-c", text)
    if answer.ok:
        return "nft accepts them"
    raise Problem("nft rejected the firewall's rules", cause=answer.err.strip()[-300:], hint="report this")


@undoes(UNDO)
def delete_table(records: Sequence[Undo], on: System) -> Undone:
    """Delete the table and cancel a pending rollback.

    Raises:
        Problem: it needs root, or nft is no longer installed while the kernel may have the table.
    """
    rollback.drop(on, TIMER)
    if on.entry(NFT) is None and on.entry(_IN_KERNEL):
        raise Problem(
            f"it is unknown whether the table {_NAME} is still loaded: nft is no longer installed",
            hint="install it (`sudo apt-get install nftables`), and run `sparkinstall uninstall` again",
        )
    if on.entry(NFT) is None or not live_table(on):
        return Undone(records[0].subject, "nothing")
    answer = on.try_run(NFT, "delete", "table", *TABLE, root=True)
    if not answer.ok:
        raise failure_of(answer, "the firewall's table could not be deleted", log=on.log)
    if live_table(on):
        raise Problem(f"the table {_NAME} is still there", hint=f"see `sudo nft list table {_NAME}`")
    return Undone(records[0].subject, "removed")


def ports_between_nodes(node: Node) -> list[tuple[int, int]]:
    """Return the port ranges of Ray and vLLM's rendezvous port: first and last of each."""
    cluster = node.config.cluster
    single = (cluster.ray_port, ray_ports.DASHBOARD, ray_ports.CLIENT, cluster.master_port)
    of_vllm = (ray_ports.FIRST_OF_VLLM, ray_ports.LAST_OF_VLLM)
    return [ray_ports.BETWEEN_NODES, of_vllm, *((port, port) for port in single)]
