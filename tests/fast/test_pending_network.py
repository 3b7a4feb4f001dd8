"""What `netplan apply` would change besides the QSFP port: an edit that nobody applied, or something set by hand."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparkinstall.errors import Blocked, Problem
from sparkinstall.facts import qsfp
from sparkinstall.resources import Conflict, Drift, State, rollback
from sparkinstall.resources.netplan import files, live, record
from sparkinstall.resources.netplan.live import LiveLink, Netplan
from sparkinstall.system import Result, Undo
from sparkinstall.system.local import LocalSystem
from tests.support.live_network import FIRST, LAN, LAN_FILE, LAN_LINES, SECOND, LiveNode
from tests.support.nodes import node_with

pytestmark = pytest.mark.skipif(shutil.which(files.PROGRAM) is None, reason="no netplan (apt-get install netplan.io)")


@pytest.fixture
def tmp_path(in_memory: Path) -> Path:
    return in_memory


@pytest.fixture
def node(tmp_path: Path) -> LiveNode:
    return LiveNode(tmp_path / "spark")


def state(on: LiveNode) -> State:
    return Netplan(node_with()).check(on)


def refused(on: LiveNode, *words: str, by: tuple[type[Netplan | LiveLink], ...] = (Netplan, LiveLink)) -> None:
    """Both resources refuse, with these words and what to do."""
    for resource in (each(node_with()) for each in by):
        found = resource.check(on)
        assert isinstance(found, Conflict), found
        assert all(word in found.message for word in words), found.message
        assert found.hint


def edited(former: str, now: str) -> str:
    assert former in LAN_LINES
    return LAN_LINES.replace(former, now)


def test_network_with_files_that_are_live_is_planned(node: LiveNode) -> None:
    assert isinstance(state(node), Drift)
    assert isinstance(LiveLink(node_with()).check(node), Drift)


EDITS = {
    "address": (LAN_FILE, edited("198.51.100.11/24", "198.51.100.77/24"), "198.51.100.77/24"),
    "one more address": (LAN_FILE, edited("[198.51.100.11/24,", "[198.51.100.11/24, 10.0.0.9/8,"), "10.0.0.9/8"),
    "prefix length": (LAN_FILE, edited("198.51.100.11/24", "198.51.100.11/25"), "198.51.100.11/25"),
    "IPv6 address": (LAN_FILE, edited("2001:db8::11", "2001:db8::77"), "2001:db8::77/64"),
    "gateway": (LAN_FILE, edited("via: 198.51.100.254", "via: 198.51.100.1"), "198.51.100.1"),
    "no gateway": (LAN_FILE, edited("      routes: [{to: default, via: 198.51.100.254}]\n", ""), "198.51.100.254"),
    "MTU": (LAN_FILE, edited("mtu: 1500", "mtu: 9000"), "9000"),
    "name server": (LAN_FILE, edited("{addresses: [198.51.100.254]}", "{addresses: [203.0.113.1]}"), "203.0.113.1"),
    "DHCP": (LAN_FILE, edited("mtu: 1500", "dhcp4: true"), "DHCP"),
    "route": (
        LAN_FILE,
        edited("{to: default", "{to: 10.9.0.0/16, via: 198.51.100.9}, {to: default"),
        "10.9.0.0/16",
    ),
    "rule": (LAN_FILE, LAN_LINES + "      routing-policy: [{from: 10.0.0.0/8, table: 100}]\n", "10.0.0.0/8"),
    "renderer": (LAN_FILE, edited("  version: 2\n", "  version: 2\n  renderer: NetworkManager\n"), "NetworkManager"),
    "renderer of a later file": (
        "etc/netplan/99-desktop.yaml",
        "network: {version: 2, renderer: NetworkManager}\n",
        "NetworkManager",
    ),
    "renderer of the interface": (LAN_FILE, LAN_LINES + "      renderer: NetworkManager\n", "NetworkManager"),
    "another interface instead": (LAN_FILE, edited("enP7s7", "eth9"), LAN),
    "bridge": (
        "etc/netplan/60-br.yaml",
        f"network: {{version: 2, bridges: {{br0: {{interfaces: [{LAN}], dhcp4: true}}}}}}\n",
        "br0",
    ),
    "VLAN": ("etc/netplan/60-v.yaml", f"network: {{version: 2, vlans: {{v7: {{id: 7, link: {LAN}}}}}}}\n", "v7"),
    "an address in a second file": (
        "etc/netplan/60-more.yaml",
        f"network: {{version: 2, ethernets: {{{LAN}: {{addresses: [10.0.0.9/8]}}}}}}\n",
        "10.0.0.9/8",
    ),
    "a file that hides the first": ("etc/netplan/01-lan.yaml", "network: {version: 2}\n", LAN),
}


@pytest.mark.parametrize(("path", "text", "word"), EDITS.values(), ids=EDITS)
def test_network_with_an_edit_that_nobody_applied_is_refused(node: LiveNode, path: str, text: str, word: str) -> None:
    node.put(path, text)
    refused(node, "netplan apply", word)


LIVE_EDITS = [each for each in EDITS if each != "DHCP"]


@pytest.mark.parametrize(("path", "text", "word"), [EDITS[each] for each in LIVE_EDITS], ids=LIVE_EDITS)
def test_network_with_an_edit_that_was_only_generated_is_refused(
    node: LiveNode, path: str, text: str, word: str
) -> None:
    """Any `systemctl daemon-reload`, of an apt-get for example, lets netplan write the renderers' files."""
    node.put(path, text)
    node.generated()
    refused(node, "netplan apply", word)


BY_HAND: dict[str, tuple[Callable[[LiveNode], None], str]] = {
    "address": (lambda on: on.interface(LAN, "198.51.100.11/24", "2001:db8::11/64", "10.0.0.9/8"), "10.0.0.9/8"),
    "IPv6 address": (
        lambda on: on.interface(LAN, "198.51.100.11/24", "2001:db8::11/64", "2001:db8::7/64"),
        "2001:db8::7/64",
    ),
    "another address": (lambda on: on.interface(LAN, "198.51.100.12/24", "2001:db8::11/64"), "198.51.100.11/24"),
    "a lease of another client": (
        lambda on: on.interface(LAN, "198.51.100.11/24", "2001:db8::11/64", leased="198.51.100.200/24"),
        "198.51.100.200/24",
    ),
    "route": (lambda on: on.route("10.9.0.0/16", LAN, gateway="198.51.100.9"), "10.9.0.0/16"),
    "IPv6 route": (lambda on: on.route("2001:db8:9::/48", LAN, gateway="2001:db8::9"), "2001:db8:9::/48"),
    "second default route": (lambda on: on.route("default", LAN, gateway="198.51.100.1", metric=9), "198.51.100.1"),
    "MTU": (lambda on: on.interface(LAN, "198.51.100.11/24", "2001:db8::11/64", mtu=1400), "1400"),
    "bridge": (lambda on: on.interface(LAN, "198.51.100.11/24", "2001:db8::11/64", master="br-x"), "br-x"),
}


@pytest.mark.parametrize(("change", "word"), BY_HAND.values(), ids=BY_HAND)
def test_network_with_the_lan_changed_by_hand_is_refused(
    node: LiveNode, change: Callable[[LiveNode], None], word: str
) -> None:
    change(node)
    refused(node, LAN, word)


def test_network_without_the_renderer_of_the_lan_is_refused(node: LiveNode) -> None:
    node.services = {"systemd-networkd": "inactive", "NetworkManager": "active"}
    refused(node, LAN, "networkd")


OWN_FILES = {
    "an address": ("etc/systemd/network/05-lan.network", f"[Match]\nName={LAN}\n[Network]\nAddress=10.0.0.9/8\n"),
    "a pattern": ("etc/systemd/network/05-lan.network", "[Match]\nName=enP7*\n[Network]\nDHCP=yes\n"),
    "a drop-in": (
        f"etc/systemd/network/10-netplan-{LAN}.network.d/more.conf",
        "[Network]\nAddress=10.0.0.9/8\n",
    ),
    "a file that hides netplan's": (f"etc/systemd/network/10-netplan-{LAN}.network", ""),
    "a file for another interface": ("etc/systemd/network/20-x.network", "[Match]\nName=eth7\n[Network]\nDHCP=no\n"),
}


@pytest.mark.parametrize(("path", "text"), OWN_FILES.values(), ids=OWN_FILES)
def test_network_with_an_edit_of_a_file_of_networkd_is_refused(node: LiveNode, path: str, text: str) -> None:
    node.interface("eth7", "10.7.0.1/24")
    node.configured_by("eth7", "")
    node.put(path, text)
    refused(node, "netplan apply", "eth7" if "eth7" in text else LAN)


DHCP = edited('addresses: [198.51.100.11/24, "2001:db8::11/64"]', "dhcp4: true")


def leased(on: LiveNode) -> None:
    on.put(LAN_FILE, DHCP)
    on.interface(LAN, leased="198.51.100.11/24")
    on.netplan_applied()


def leased_for_ever(on: LiveNode) -> None:
    leased(on)
    on.interface(LAN, "198.51.100.11/24")
    on.put(f"run/systemd/netif/leases/{on.links[LAN]['ifindex']}", "ADDRESS=198.51.100.11\n")


def absent_interface(on: LiveNode) -> None:
    on.put(
        "etc/netplan/60-usb.yaml",
        "network: {version: 2, ethernets: {usb0: {addresses: [10.0.0.9/8]}}, vlans: {v7: {id: 7, link: usb0}}}\n",
    )
    on.generated()


SERVERS_AND_RULES = f"""\
[Match]
Name={LAN}
[Network]
Address=198.51.100.11/24
Address=2001:db8::11/64
Gateway=198.51.100.254
DNS=198.51.100.254 2001:DB8::53
DNS=9.9.9.9#dns.example
[RoutingPolicyRule]
From=10.0.0.7
To=192.0.2.9/24
[RoutingPolicyRule]
From=2001:DB8::/32
To=::/0
"""


def servers_and_rules(on: LiveNode) -> None:
    path = "etc/systemd/network/05-lan.network"
    on.put(path, SERVERS_AND_RULES)
    on.configured_by(LAN, f"/{path}", "DNS=198.51.100.254 2001:db8::53 9.9.9.9#dns.example")
    on.rules = {
        "-4": "0:\tfrom all lookup local\n32765:\tfrom 10.0.0.7 to 192.0.2.0/24 lookup 7 proto static\n",
        "-6": "32765:\tfrom 2001:db8::/32 lookup 7 proto static\n",
    }


@pytest.mark.parametrize("word", ["10.0.0.7", "192.0.2.0/24", "2001:db8::/32"])
def test_network_with_a_rule_that_is_not_live_is_refused(node: LiveNode, word: str) -> None:
    servers_and_rules(node)
    node.rules = {family: lines.replace(word, "203.0.113.0/28") for family, lines in node.rules.items()}
    refused(node, "lacks the rule", word)


QUIET: dict[str, Callable[[LiveNode], None]] = {
    "containers": lambda on: on.interface("docker0", "172.17.0.1/16"),
    "name servers and rules": servers_and_rules,
    "a tunnel": lambda on: on.route("100.64.0.0/10", "tailscale0"),
    "a lease": leased,
    "a lease for ever": leased_for_ever,
    "announced addresses": lambda on: on.interface(
        LAN, "198.51.100.11/24", "2001:db8::11/64", "fe80::1/64", leased="2001:db8:1::9/64"
    ),
    "no carrier": lambda on: on.interface(LAN, flags=["UP"]),
    "a file of an interface that is not there": absent_interface,
    "a comment": lambda on: on.put(LAN_FILE, "# the office\n" + LAN_LINES),
    "an edit of the port itself": lambda on: on.put(
        "etc/netplan/60-cx7.yaml", f"network: {{version: 2, ethernets: {{{FIRST}: {{dhcp4: true}}}}}}\n"
    ),
    "networkd's own files": lambda on: on.put(
        "usr/lib/systemd/network/80-wifi-adhoc.network", "[Match]\nType=wlan\nWLANInterfaceType=ad-hoc\n"
    ),
}


@pytest.mark.parametrize("change", QUIET.values(), ids=QUIET)
def test_network_with_what_netplan_leaves_alone_is_planned(node: LiveNode, change: Callable[[LiveNode], None]) -> None:
    change(node)
    assert isinstance(state(node), Drift), state(node)


def test_network_that_is_set_up_ignores_edits_of_others(node: LiveNode) -> None:
    """Nothing is to be applied, so nothing of theirs would be."""
    wanted = Netplan(node_with()).check(node)
    assert isinstance(wanted, Drift)
    node.put("etc/netplan/40-cx7.yaml", wanted.after.partition("\n")[2])
    node.interface(FIRST, "192.168.100.10/24", mtu=9000)
    node.interface(SECOND, "192.168.101.10/24", mtu=9000)
    node.put(LAN_FILE, edited("198.51.100.11/24", "198.51.100.77/24"))
    assert not isinstance(state(node), Conflict | Drift)
    assert not isinstance(LiveLink(node_with()).check(node), Conflict | Drift)


def test_network_that_an_interrupted_run_wrote_is_planned(node: LiveNode) -> None:
    """Killed after the file was written, and before it was applied."""
    wanted = Netplan(node_with()).check(node)
    assert isinstance(wanted, Drift)
    node.put("etc/netplan/40-cx7.yaml", wanted.after.partition("\n")[2])
    assert isinstance(LiveLink(node_with()).check(node), Drift)


def test_network_with_files_that_netplan_rejects_is_refused(node: LiveNode) -> None:
    node.put("etc/netplan/60-x.yaml", "network: {version: 2, ethernets: {eth9: {gatway4: 1.2.3.4}}}\n")
    refused(node, "netplan rejects", "gatway4")


def test_network_with_a_wifi_password_not_applied_hides_it(node: LiveNode) -> None:
    node.put(
        "etc/netplan/60-wifi.yaml",
        "network: {version: 2, renderer: NetworkManager, wifis: {wlP9s9: {access-points:"
        " {home: {password: not-to-be-shown}}}}}\n",
    )
    found = state(node)
    assert isinstance(found, Conflict) and "not-to-be-shown" not in found.message + found.hint


# --- the QSFP port itself


def test_network_with_a_half_in_a_bridge_is_refused(node: LiveNode) -> None:
    for name, master in ((FIRST, "br-x"), (SECOND, "vrf-blue"), (FIRST, "bond0"), (SECOND, "ovs-system")):
        node.interface(name, master=master)
        refused(node, name, master, by=(Netplan,))
        node.interface(name)


CLAIMED_BY_NETWORKD = {
    "name": ("etc/systemd/network/05-cx7.network", f"[Match]\nName={FIRST}\n[Network]\nAddress=10.9.0.1/24\n"),
    "the second half": ("etc/systemd/network/05-cx7.network", f"[Match]\nName=eth0 {SECOND}\n[Link]\nMTUBytes=2500\n"),
    "pattern": ("etc/systemd/network/00-all.network", "[Match]\nName=en*np0\n[Network]\nDHCP=yes\n"),
    "all but one": ("etc/systemd/network/00-all.network", "[Match]\nName=!enP7s7 lo\n[Network]\nDHCP=yes\n"),
    "driver": ("etc/systemd/network/10-a.network", "[Match]\nDriver=mlx5_core\n[Network]\nDHCP=no\n"),
    "MAC address": ("run/systemd/network/05-x.network", "[Match]\nMACAddress={mac}\n[Network]\nDHCP=no\n"),
    "type": ("usr/lib/systemd/network/05-x.network", "[Match]\nType=ether\nKind=!*\n[Network]\nDHCP=yes\n"),
    "another condition": (
        "usr/local/lib/systemd/network/05-x.network",
        f"[Match]\nName={FIRST}\nHost=spark-1\n[Network]\nDHCP=yes\n",
    ),
    "a file that hides netplan's": (f"etc/systemd/network/10-netplan-{FIRST}.network", ""),
    "a drop-in": (f"etc/systemd/network/10-netplan-{SECOND}.network.d/x.conf", "[Link]\nMTUBytes=1500\n"),
}


@pytest.mark.parametrize(("path", "text"), CLAIMED_BY_NETWORKD.values(), ids=CLAIMED_BY_NETWORKD)
def test_network_with_a_file_of_networkd_for_the_port_is_refused(node: LiveNode, path: str, text: str) -> None:
    # The LAN would change too, with some of these, and that is another reason.
    node.interface(LAN, flags=[], ifindex=99)
    node.put(path, text.format(mac=node.links[FIRST]["address"]))
    refused(node, f"/{path}", "networkd", by=(Netplan,))


NOT_CLAIMED = {
    "a later file": ("etc/systemd/network/50-cx7.network", f"[Match]\nName={FIRST}\n[Network]\nDHCP=yes\n"),
    "another interface": ("etc/systemd/network/05-x.network", "[Match]\nName=eth9\n[Network]\nDHCP=yes\n"),
    "no condition": ("etc/systemd/network/05-x.network", "[Network]\nDHCP=yes\n"),
    "wireless": ("etc/systemd/network/05-x.network", "[Match]\nWLANInterfaceType=station\n[Network]\nDHCP=yes\n"),
    "another ending": ("etc/systemd/network/05-x.network.bak", f"[Match]\nName={FIRST}\n"),
    "a comment": ("etc/systemd/network/05-x.network", f"[Match]\n# Name={FIRST}\nName=eth9\n"),
    "a drop-in of another": ("etc/systemd/network/10-netplan-eth9.network.d/x.conf", "[Link]\nMTUBytes=1500\n"),
}


@pytest.mark.parametrize(("path", "text"), NOT_CLAIMED.values(), ids=NOT_CLAIMED)
def test_network_with_another_file_of_networkd_is_planned(node: LiveNode, path: str, text: str) -> None:
    node.put(path, text)
    assert isinstance(state(node), Drift), state(node)


CLAIMED_BY_OTHERS = {
    "profile without an ending": (
        "etc/NetworkManager/system-connections/cx7",
        f"[connection]\ninterface-name={FIRST}\n",
    ),
    "profile of a MAC address": (
        "etc/NetworkManager/system-connections/cx7.nmconnection",
        "[connection]\nid=cx7\n[ethernet]\nmac-address={mac}\n",
    ),
    "profile with a pattern": (
        "usr/lib/NetworkManager/system-connections/cx7.nmconnection",
        "[connection]\nid=cx7\n[match]\ninterface-name=eth9;enp1*;\n",
    ),
    "profile until the next boot": (
        "run/NetworkManager/system-connections/cx7.nmconnection",
        f"[connection]\ninterface-name={SECOND}\n",
    ),
    "ifupdown": ("etc/network/interfaces", f"auto lo\nauto eth9 {FIRST}\niface {FIRST} inet dhcp\n"),
    "ifupdown's folder": ("etc/network/interfaces.d/cx7", f"  iface {SECOND} inet static\n  address 10.9.0.1/24\n"),
}


@pytest.mark.parametrize(("path", "text"), CLAIMED_BY_OTHERS.values(), ids=CLAIMED_BY_OTHERS)
def test_network_with_the_port_in_files_of_another_program_is_refused(node: LiveNode, path: str, text: str) -> None:
    node.put("usr/sbin/ifup", "")
    node.put(path, text.format(mac=node.links[FIRST]["address"].upper()))
    refused(node, f"/{path}", by=(Netplan,))
    # Without the program, nobody reads its file.
    if "interfaces" in path:
        node.delete("usr/sbin/ifup")
        assert isinstance(state(node), Drift)


# --- after a rollback, and after an uninstall


class Changing(LiveNode, LocalSystem):
    """A node on which programs that change something are recorded, and end well."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.ran: list[tuple[str, ...]] = []

    def try_run(self, *argv: str, **_: Any) -> Result:
        self.ran.append(argv)
        return Result(argv, 0, "", "")


LOST: dict[str, tuple[Callable[[LiveNode], None], str]] = {
    "address": (
        lambda on: on.interface(LAN, "198.51.100.77/24", "2001:db8::11/64", "fe80::11/64"),
        "enP7s7 lacks 198.51.100.11/24 (`sudo ip address add 198.51.100.11/24 dev enP7s7`)",
    ),
    "every address": (lambda on: on.interface(LAN), "lacks 2001:db8::11/64"),
    "route": (
        lambda on: on.routes.clear(),
        "`sudo ip -4 route add default via 198.51.100.254 dev enP7s7 proto static`",
    ),
    "file": (lambda on: on.configured_by(LAN, ""), "networkd configures enP7s7 with no file"),
    "name server": (
        lambda on: on.configured_by(LAN, f"/run/systemd/network/10-netplan-{LAN}.network", "DNS=203.0.113.1"),
        "`sudo resolvectl dns enP7s7 198.51.100.254`",
    ),
    "rule": (lambda on: on.rules.clear(), "`sudo ip -4 rule add pref 50 from 10.0.0.0/8 lookup 100`"),
    "interface": (lambda on: on.links.__delitem__(LAN), "enP7s7 does not exist"),
    "address of ours": (lambda on: on.interface(FIRST, "192.168.100.10/24"), "still has 192.168.100.10/24"),
    "MTU of ours": (lambda on: on.interface(FIRST, mtu=9000), "sudo ip link set dev enp1s0f0np0 mtu 1500"),
}


@pytest.mark.parametrize(("happened", "word"), LOST.values(), ids=LOST)
def test_rollback_that_does_not_restore_everything_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, happened: Callable[[LiveNode], None], word: str
) -> None:
    node = Changing(tmp_path / "spark")
    node.rules["-4"] = "0:\tfrom all lookup local\n50:\tfrom 10.0.0.0/8 lookup 100\n32766:\tfrom all lookup main\n"
    node.configured_by(LAN, f"/run/systemd/network/10-netplan-{LAN}.network", "DNS=198.51.100.254")
    monkeypatch.setattr(rollback, "fire", lambda *_: True)
    monkeypatch.setattr(record, "_PATIENCE", 0)
    before, added = record.taken(node, [LAN, FIRST, SECOND]), {FIRST: "192.168.100.10/24"}
    whole = live.rolled_back(node, Problem("the link did not come up", hint="look at the cable"), before, added)
    assert whole.message == "the link did not come up; the former network was restored"
    happened(node)
    part = live.rolled_back(node, Problem("the link did not come up", hint="look at the cable"), before, added)
    assert "; the former network was restored" not in part.message and word in part.message, part.message
    assert "commands" in part.hint and "look at the cable" in part.hint


def undo_of(node: LiveNode) -> Undo:
    return Undo("netplan", "the QSFP link", record.taken(node, [FIRST, SECOND]), {FIRST: "192.168.100.10/24"})


@pytest.mark.parametrize("what", ["address", "renderer", "bridge"])
def test_uninstall_with_an_edit_that_nobody_applied_is_refused(tmp_path: Path, what: str) -> None:
    node = Changing(tmp_path / "spark")
    path, text, word = EDITS[what]
    undo = undo_of(node)
    node.put(path, text)
    with pytest.raises(Blocked) as raised:
        live.restore([undo], node)
    assert word in raised.value.message and not node.ran


def test_uninstall_that_does_not_restore_everything_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = Changing(tmp_path / "spark")
    monkeypatch.setattr(record, "_PATIENCE", 0)
    undo = undo_of(node)
    assert live.restore([undo], node).outcome == "restored"
    node.interface(FIRST, mtu=9000)
    with pytest.raises(Problem, match="ip link set dev enp1s0f0np0 mtu 1500"):
        live.restore([undo], node)


def test_uninstall_with_a_card_that_was_removed_restores_the_rest(tmp_path: Path) -> None:
    node = Changing(tmp_path / "spark")
    undo = undo_of(node)
    del node.links[FIRST]
    assert live.restore([undo], node).outcome == "restored"


def test_uninstall_without_ip_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No interface is not an interface that was removed."""
    node = Changing(tmp_path / "spark")
    undo = undo_of(node)
    monkeypatch.setattr(node, "ask", lambda *argv, **_: Result(argv, 127, "", "ip: not found"))
    for present in (True, False):
        if not present:
            node.delete("usr/sbin/netplan")
        with pytest.raises(Problem):
            live.restore([undo], node)


def test_uninstall_without_netplan_fails_until_the_former_network_is_live(tmp_path: Path) -> None:
    node = Changing(tmp_path / "spark")
    undo = undo_of(node)
    node.delete("usr/sbin/netplan")
    node.interface(FIRST, "192.168.100.10/24", mtu=9000)
    with pytest.raises(Blocked, match=r"netplan is no longer installed") as found:
        live.restore([undo], node)
    assert "apt-get install netplan.io" in found.value.hint
    node.interface(FIRST)
    assert live.restore([undo], node).outcome == "nothing"


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        (f"# {FIRST} has 192.168.100.10/24\n{LAN_LINES}", False),
        (edited("{addresses: [198.51.100.254]}", "{addresses: [192.168.100.10]}"), False),
        (LAN_LINES + f"    {FIRST}: {{addresses: [192.168.100.10/24]}}\n", True),
        (LAN_LINES + f"    {FIRST}: {{addresses: [192.168.100.10/24: {{label: a}}]}}\n", True),
        (LAN_LINES + f"    {FIRST}: {{addresses: [192.168.100.10/16]}}\n", True),
    ],
)
def test_uninstall_keeps_an_address_only_if_a_file_configures_it(tmp_path: Path, lines: str, named: bool) -> None:
    node = Changing(tmp_path / "spark")
    undo = undo_of(node)
    node.put(LAN_FILE, lines)
    node.netplan_applied()
    node.interface(FIRST, mtu=1500)
    live.restore([undo], node)
    (script,) = [argv[-1] for argv in node.ran if argv[:2] == ("sh", "-ec")]
    assert ("ip address del 192.168.100.10/24 dev" in script) == (not named)


def test_network_confirmed_too_late_says_what_is_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The timer may have been faster than the change, which it then did not roll back."""
    node = Changing(tmp_path / "spark")

    def too_late(*_: object) -> None:
        raise rollback.RolledBack("the network change was not confirmed in time: its rollback timer has run")

    monkeypatch.setattr(record, "_PATIENCE", 0)
    monkeypatch.setattr(qsfp, "used_port", lambda *_: None)
    monkeypatch.setattr(rollback, "arm", lambda *_: None)
    monkeypatch.setattr(rollback, "disarm", too_late)
    monkeypatch.setattr(live, "_settle", lambda *_: node.interface(FIRST, "192.168.100.10/24", mtu=9000))
    with pytest.raises(Problem, match=r"not the whole former network was restored: .*still has 192\.168\.100\.10/24"):
        LiveLink(node_with()).apply(node)


KEYS = st.sampled_from(
    [
        "mtu: {n}",
        "addresses: [10.{n}.0.1/24]",
        "dhcp4: true",
        "wakeonlan: true",
        "nameservers: {{addresses: [10.0.{n}.1]}}",
    ]
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(KEYS, min_size=1, max_size=3, unique=True), n=st.integers(70, 250), later=st.booleans())
def test_network_with_any_edit_is_refused(tmp_path: Path, lines: list[str], n: int, later: bool) -> None:
    shutil.rmtree(tmp_path / "spark", ignore_errors=True)
    on = LiveNode(tmp_path / "spark")
    body = ", ".join(each.format(n=n) for each in lines)
    on.put(f"etc/netplan/{'99' if later else '02'}-edit.yaml", f"network: {{ethernets: {{{LAN}: {{{body}}}}}}}\n")
    refused(on, "netplan apply", LAN)
