"""netplan's files: what configures the QSFP port is found, replaced and restored; the real netplan reads the result."""

import os
import shutil
import tempfile
from ipaddress import IPv4Interface
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkinstall.config import Layer, build
from sparkinstall.core import checks
from sparkinstall.core.engine import converge
from sparkinstall.errors import Blocked, Problem
from sparkinstall.events import silent
from sparkinstall.journal.state_dir import StateFolder
from sparkinstall.journal.system import JournaledSystem
from sparkinstall.journal.undo import undo_all
from sparkinstall.node import Node
from sparkinstall.probes import link
from sparkinstall.resources import Conflict, Drift, NodeOnly, Ok, State, state_of
from sparkinstall.resources.netplan import files
from sparkinstall.resources.netplan.live import LiveLink, Netplan, restore
from sparkinstall.stacks import load
from sparkinstall.steps.network import Network
from sparkinstall.system import Undo
from sparkinstall.system.local import LocalReader, LocalSystem
from tests.support.rehearsals import OLD, difference, files_with_times, tree

pytestmark = pytest.mark.skipif(shutil.which(files.PROGRAM) is None, reason="no netplan (apt-get install netplan.io)")

FIRST, SECOND = "enp1s0f0np0", "enP2p1s0f0np0"
TARGET = "etc/netplan/40-cx7.yaml"
KEYFILES = "etc/NetworkManager/system-connections"
LAN = "network: {version: 2, renderer: networkd, ethernets: {enP7s7: {dhcp4: true}}}\n"


def node(**settings: object) -> Node:
    """A head with the defaults and `settings`, with `__` for a dot."""
    values = {"cluster.role": "head", **{name.replace("__", "."): value for name, value in settings.items()}}
    config, _ = build([Layer("the test", values)])
    here = Path("/nowhere")
    return Node(config, load(config.stack), "aarch64", "aarch64", True, False, "/home/spark", here)


class Rehearsed:
    """A rehearsal with netplan files."""

    def __init__(self, top: Path) -> None:
        self.top, self.root = top, top / "node"
        self.root.mkdir()
        self.state = StateFolder(LocalSystem(str(self.root)))

    def put(self, path: str, text: str, mode: int = 0o600) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(mode)
        return file

    def check(self, of: Node | None = None) -> State:
        return Netplan(of or node()).check(LocalReader(str(self.root)))

    def apply(self, of: Node | None = None) -> None:
        with self.state.hold("all", silent):
            log = self.top / "log"
            (report,) = converge(
                [Network()],
                of or node(),
                lambda step: JournaledSystem(self.state.system, self.state.journal(), step, log, silent),
                silent,
            )
        if report.problem:
            raise report.problem

    def network(self, path: str = TARGET) -> dict[str, object]:
        found: dict[str, object] = yaml.safe_load((self.root / path).read_text())["network"]
        return found

    def ethernets(self, path: str = TARGET) -> dict[str, dict[str, object]]:
        found = self.network(path)["ethernets"]
        assert isinstance(found, dict)
        return found

    def generated(self) -> set[str]:
        """The names of the networkd files that netplan generates."""
        copy = self.top / "generated"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.root / "etc/netplan", copy / "etc/netplan")
        answer = LocalReader().ask(files.PROGRAM, "generate", "--root-dir", str(copy))
        assert answer.ok, answer.err
        return {path.name for path in copy.glob("run/systemd/network/*.network")}


@pytest.fixture
def rehearsed(tmp_path: Path) -> Rehearsed:
    return Rehearsed(tmp_path)


def test_netplan_gives_each_half_an_address_in_its_subnet(rehearsed: Rehearsed) -> None:
    assert isinstance(rehearsed.check(), Drift)
    rehearsed.apply()
    assert isinstance(rehearsed.check(), Ok)
    one, other = rehearsed.ethernets()[FIRST], rehearsed.ethernets()[SECOND]
    assert one["addresses"] == ["192.168.100.10/24"]
    assert other["addresses"] == ["192.168.101.10/24"]
    for each in (one, other):
        wanted = {"mtu": 9000, "dhcp4": False, "dhcp6": False, "link-local": [], "renderer": "networkd"}
        assert wanted.items() <= each.items()
        assert each["optional"] is True
    assert (rehearsed.root / TARGET).stat().st_mode & 0o777 == 0o600
    assert rehearsed.generated() == {f"10-netplan-{name}.network" for name in (FIRST, SECOND)}


def test_netplan_of_a_worker_keeps_the_host_part_in_both_subnets(rehearsed: Rehearsed) -> None:
    worker = node(
        cluster__role="worker",
        cluster__head="10.1.2.65",
        cluster__workers=["10.1.2.66", "10.1.2.67"],
        cluster__address="10.1.2.67",
        network__prefix_length=27,
        network__twin_subnet="10.1.3.32",
        network__mtu=4200,
    )
    rehearsed.apply(worker)
    assert rehearsed.ethernets()[FIRST]["addresses"] == ["10.1.2.67/27"]
    assert rehearsed.ethernets()[SECOND]["addresses"] == ["10.1.3.35/27"]
    assert rehearsed.ethernets()[FIRST]["mtu"] == 4200


def test_network_step_of_one_node_or_unmanaged_declares_nothing() -> None:
    assert Network().wanted(node())
    assert not Network().wanted(node(cluster__role="single"))
    assert not list(Network().resources(node(network__manage=False)))


def test_live_link_in_a_rehearsal_is_node_only(rehearsed: Rehearsed) -> None:
    state = state_of(LiveLink(node()), LocalReader(str(rehearsed.root)))
    assert isinstance(state, NodeOnly)
    assert f"{FIRST}: 192.168.100.10/24, MTU 9000" in state.reason
    found = checks.look(link.probes(node()), LocalReader(str(rehearsed.root)), silent)
    assert {each.verdict for each in found} == {"skip"}


def test_netplan_applied_twice_changes_nothing(rehearsed: Rehearsed) -> None:
    rehearsed.put("etc/netplan/50-others.yaml", LAN)
    rehearsed.apply()
    before = tree(rehearsed.root / "etc", files_with_times)
    rehearsed.apply()
    assert tree(rehearsed.root / "etc", files_with_times) == before


def test_netplan_with_a_loose_mode_restricts_it(rehearsed: Rehearsed) -> None:
    rehearsed.apply()
    (rehearsed.root / TARGET).chmod(0o644)
    assert isinstance(rehearsed.check(), Drift)
    rehearsed.apply()
    assert (rehearsed.root / TARGET).stat().st_mode & 0o777 == 0o600


ELSEWHERE = {
    "by name": f"ethernets: {{{FIRST}: {{dhcp4: true}}}}",
    "both": f"ethernets: {{{FIRST}: {{addresses: [10.9.9.9/24]}}, {SECOND}: {{dhcp4: true}}}}",
    "by match": f"ethernets: {{cx7: {{match: {{name: {FIRST}}}, dhcp4: true}}}}",
    "by set-name": f"ethernets: {{x: {{match: {{macaddress: '02:00:00:00:00:01'}}, set-name: {SECOND}, mtu: 1500}}}}",
    "by NetworkManager": (
        "ethernets: {NM-14f59568-5076-387a-aef6-10adfcca2e26: {renderer: NetworkManager,"
        f" match: {{name: {FIRST}}}, dhcp4: true, networkmanager: {{uuid: 14f59568-5076-387a-aef6-10adfcca2e26,"
        " name: Wired connection 2}}}"
    ),
    "by NetworkManager's own words": (
        "nm-devices: {NM-14f59568-5076-387a-aef6-10adfcca2e26: {renderer: NetworkManager, networkmanager:"
        f" {{passthrough: {{connection.type: ethernet, connection.interface-name: {FIRST}}}}}}}}}"
    ),
}


@pytest.mark.parametrize("what", ELSEWHERE.values(), ids=ELSEWHERE)
def test_netplan_file_of_our_port_only_is_removed_and_restored(rehearsed: Rehearsed, what: str) -> None:
    theirs = rehearsed.put("etc/netplan/90-theirs.yaml", f"# mine\nnetwork: {{version: 2, {what}}}\n", 0o640)
    os.utime(theirs, ns=(OLD, OLD))
    before = tree(rehearsed.root, files_with_times)
    state = rehearsed.check()
    assert isinstance(state, Drift)
    assert "90-theirs.yaml" in state.summary
    assert "# mine" in state.before and "# mine" not in state.after
    rehearsed.apply()
    assert not theirs.exists()
    assert isinstance(rehearsed.check(), Ok)
    undo_all(rehearsed.state)
    assert not (difference(before, tree(rehearsed.root, files_with_times)))


def test_netplan_file_of_more_interfaces_loses_only_our_port(rehearsed: Rehearsed) -> None:
    theirs = rehearsed.put(
        "etc/netplan/50-cloud-init.yaml",
        "# kept by cloud-init\nnetwork:\n  version: 2\n  renderer: NetworkManager\n  ethernets:\n"
        f"    enP7s7: {{dhcp4: yes, macaddress: 10:20:30:40:50:11}}\n    {FIRST}:\n      mtu: 1500\n"
        "  wifis:\n    wlP9s9:\n      dhcp4: on\n      access-points:\n        home:\n"
        "          password: not-to-be-shown\n",
    )
    before = tree(rehearsed.root, files_with_times)
    state = rehearsed.check()
    assert isinstance(state, Drift)
    assert "not-to-be-shown" not in state.before + state.after
    assert "wlP9s9" in state.after
    rehearsed.apply()
    assert set(rehearsed.ethernets("etc/netplan/50-cloud-init.yaml")) == {"enP7s7"}
    # Kept as written: older YAML parsers read an unquoted MAC address as a number.
    assert "10:20:30:40:50:11" in theirs.read_text() and "password: not-to-be-shown" in theirs.read_text()
    assert rehearsed.network("etc/netplan/50-cloud-init.yaml")["renderer"] == "NetworkManager"
    assert rehearsed.ethernets()[FIRST]["renderer"] == "NetworkManager"
    assert isinstance(rehearsed.check(), Ok)
    undo_all(rehearsed.state)
    assert not (difference(before, tree(rehearsed.root, files_with_times)))


def test_netplan_file_of_nvidia_keeps_the_other_port(rehearsed: Rehearsed) -> None:
    other = "enp1s0f1np1"
    rehearsed.put(
        TARGET,
        "network:\n  version: 2\n  ethernets:\n"
        f"    {FIRST}: {{link-local: [ ipv4 ]}}\n    {other}: {{link-local: [ ipv4 ]}}\n"
        f"  bridges:\n    br0: {{interfaces: [{other}], dhcp4: no}}\n",
    )
    before = tree(rehearsed.root, files_with_times)
    rehearsed.apply()
    assert rehearsed.ethernets()[other] == {"link-local": ["ipv4"]}
    assert rehearsed.ethernets()[FIRST]["link-local"] == []
    assert rehearsed.network()["bridges"] == {"br0": {"interfaces": [other], "dhcp4": False}}
    assert isinstance(rehearsed.check(), Ok)
    rehearsed.generated()
    undo_all(rehearsed.state)
    assert not (difference(before, tree(rehearsed.root, files_with_times)))


def test_netplan_with_another_interface_drops_the_first_port(rehearsed: Rehearsed) -> None:
    rehearsed.apply()
    moved = node(network__interface="enp1s0f1np1")
    assert isinstance(rehearsed.check(moved), Drift)
    rehearsed.apply(moved)
    assert set(rehearsed.ethernets()) == {"enp1s0f1np1", "enP2p1s0f1np1"}
    assert isinstance(rehearsed.check(moved), Ok)


def conflict(state: State) -> str:
    assert isinstance(state, Conflict), state
    assert state.hint
    return state.message


IN_THE_WAY = {
    "pattern": ("ethernets: {all: {match: {name: 'en*'}, dhcp4: true}}", "`all` in"),
    "driver": ("ethernets: {all: {match: {driver: mlx5_core}, dhcp4: true}}", "together with"),
    "everything": ("ethernets: {all: {match: {}, dhcp4: true}}", "together with"),
    "bond": (
        f"ethernets: {{{FIRST}: {{}}, {SECOND}: {{}}}}, bonds: {{bond0: {{interfaces: [{FIRST}, {SECOND}]}}}}",
        f"`bond0` (bonds) in /etc/netplan/50-theirs.yaml contains {FIRST}",
    ),
    "bond of a name that matches": (
        f"ethernets: {{one: {{match: {{name: {FIRST}}}}}}}, bonds: {{bond0: {{interfaces: [one]}}}}",
        "contains one",
    ),
    "bridge": (f"bridges: {{br0: {{interfaces: [{SECOND}]}}}}", "`br0`"),
    "vlan": (f"vlans: {{v7: {{id: 7, link: {FIRST}}}}}", "`v7`"),
    "address": ("ethernets: {enP7s7: {addresses: [192.168.101.10/16]}}", "192.168.101.10 is already in use"),
    "address with a label": (
        "ethernets: {enP7s7: {addresses: [{192.168.100.10/24: {label: x}}]}}",
        "192.168.100.10 is already in use",
    ),
}


@pytest.mark.parametrize(("what", "sentence"), IN_THE_WAY.values(), ids=IN_THE_WAY)
def test_netplan_with_an_entry_that_cannot_be_split_conflicts(rehearsed: Rehearsed, what: str, sentence: str) -> None:
    rehearsed.put("etc/netplan/50-theirs.yaml", f"network: {{version: 2, {what}}}\n")
    message = conflict(rehearsed.check())
    assert sentence in message and "/etc/netplan/50-theirs.yaml" in message
    with pytest.raises(Problem):
        rehearsed.apply()
    assert not (rehearsed.root / TARGET).exists()


@pytest.mark.parametrize("folder", ["lib", "run"])
def test_netplan_file_outside_etc_conflicts(rehearsed: Rehearsed, folder: str) -> None:
    rehearsed.put(f"{folder}/netplan/10-image.yaml", f"network: {{ethernets: {{{FIRST}: {{dhcp4: true}}}}}}\n")
    assert f"/{folder}/netplan/10-image.yaml configures" in conflict(rehearsed.check())
    rehearsed.put("etc/netplan/10-image.yaml", "")
    assert isinstance(rehearsed.check(), Drift)


@pytest.mark.parametrize("line", [f"interface-name={FIRST}", f"interface-name = {SECOND} "])
def test_netplan_with_a_networkmanager_profile_of_our_port_conflicts(rehearsed: Rehearsed, line: str) -> None:
    """netplan does not know it, and at the next boot either may win."""
    rehearsed.put(f"{KEYFILES}/lan.nmconnection", "[connection]\nid=lan\ninterface-name=enP7s7\n")
    assert isinstance(Netplan(node()).check(rehearsed.state.system), Drift)
    rehearsed.put(f"{KEYFILES}/by hand.nmconnection", f"[connection]\nid=by hand\n{line}\n[ipv4]\nmethod=auto\n")
    state = Netplan(node()).check(rehearsed.state.system)
    assert isinstance(state, Conflict)
    assert "by hand.nmconnection" in state.message
    assert "sudo rm '/etc/NetworkManager/system-connections/by hand.nmconnection'" in state.hint


def test_netplan_with_a_networkmanager_profile_of_any_interface_keeps_it(rehearsed: Rehearsed) -> None:
    rehearsed.put(
        "etc/netplan/90-NM-any.yaml",
        "network: {version: 2, ethernets: {NM-any: {renderer: NetworkManager, match: {}, dhcp4: true, networkmanager:"
        " {uuid: 14f59568-5076-387a-aef6-10adfcca2e26, name: any}}}}\n",
    )
    rehearsed.apply()
    assert (rehearsed.root / "etc/netplan/90-NM-any.yaml").exists()


BAD = {
    "no YAML": ("network: {version: 2\n", "is not YAML"),
    "a tab": ("network:\n\tversion: 2\n", "is not YAML: there is a tab in line 2"),
    "twice": (
        f"network:\n  ethernets:\n    {FIRST}: {{}}\n    {FIRST}: {{}}\n",
        f"the key `{FIRST}` is repeated, line 4",
    ),
    "a field twice": ("network: {ethernets: {a: {mtu: 1500, mtu: 9000}}}\n", "the key `mtu` is repeated"),
    "too deep": ("[" * 500, "is not YAML"),
    "bytes": ("\x00\x01", "is not YAML"),
}


@pytest.mark.parametrize(("text", "sentence"), BAD.values(), ids=BAD)
def test_netplan_file_with_bad_yaml_conflicts(rehearsed: Rehearsed, text: str, sentence: str) -> None:
    rehearsed.put("etc/netplan/50-theirs.yaml", text)
    message = conflict(rehearsed.check())
    assert sentence in message and "/etc/netplan/50-theirs.yaml" in message


@pytest.mark.parametrize("text", ["", "# nothing\n"])
def test_netplan_file_without_interfaces_is_ignored(rehearsed: Rehearsed, text: str) -> None:
    rehearsed.put("etc/netplan/50-theirs.yaml", text)
    assert isinstance(rehearsed.check(), Drift)


@pytest.mark.parametrize("text", ["42\n", "network:\n", "network: [1]\n", "network: {ethernets: 7}\n"])
def test_netplan_file_of_another_shape_is_left_to_netplan(
    rehearsed: Rehearsed, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    rehearsed.put("etc/netplan/50-theirs.yaml", text)
    assert "netplan rejects the new files" in conflict(rehearsed.check())
    monkeypatch.setattr(files, "PROGRAM", "/nonexistent/netplan")
    assert isinstance(rehearsed.check(), Drift)


def test_netplan_file_that_netplan_rejects_changes_nothing(rehearsed: Rehearsed) -> None:
    rehearsed.put(
        "etc/netplan/50-theirs.yaml", "network:\n  version: 2\n  ethernets:\n    eth9:\n      gatway4: 1.2.3.4\n"
    )
    before = tree(rehearsed.root / "etc")
    with pytest.raises(Blocked) as raised:
        rehearsed.apply()
    for said in (raised.value.message, conflict(rehearsed.check())):
        assert "/etc/netplan/50-theirs.yaml:5:" in said and "gatway4" in said
        assert "sparkinstall-netplan" not in said
    assert tree(rehearsed.root / "etc") == before


REJECTED = (
    ("ethernets:\n    eth9:\n      gatway4: 1.2.3.4\n", "gatway4"),
    ("ethernets:\n    eth9:\n      addresses: [10.0.0.300/24]\n", "10.0.0.300"),
    ("ethernets:\n    eth9:\n      mtu: large\n", "large"),
    ("bridges:\n    br0:\n      interfaces: [nowhere]\n", "nowhere"),
    ("renderer: systemd\n", "systemd"),
)


@pytest.mark.parametrize(("text", "word"), REJECTED)
def test_plan_shows_the_files_to_netplan(rehearsed: Rehearsed, text: str, word: str) -> None:
    rehearsed.put("etc/netplan/50-theirs.yaml", f"network:\n  version: 2\n  {text}")
    message = conflict(rehearsed.check())
    assert message.startswith("netplan rejects the new files") and word in message


def test_plan_without_netplan_on_this_machine_shows_the_files_only(
    rehearsed: Rehearsed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PROGRAM", "/nonexistent/netplan")
    rehearsed.put("etc/netplan/50-theirs.yaml", f"network:\n  version: 2\n  {REJECTED[0][0]}")
    assert isinstance(rehearsed.check(), Drift)


def test_netplan_with_a_link_as_target_replaces_and_restores_it(rehearsed: Rehearsed) -> None:
    rehearsed.put("etc/theirs.yaml", f"network: {{version: 2, ethernets: {{{FIRST}: {{mtu: 1500}}}}}}\n")
    (rehearsed.root / "etc/netplan").mkdir()
    (rehearsed.root / TARGET).symlink_to("../theirs.yaml")
    before = tree(rehearsed.root, files_with_times)
    rehearsed.apply()
    assert not (rehearsed.root / TARGET).is_symlink()
    undo_all(rehearsed.state)
    assert not (difference(before, tree(rehearsed.root, files_with_times)))


def test_undo_of_a_netplan_file_changed_since_keeps_it(rehearsed: Rehearsed) -> None:
    rehearsed.apply()
    file = rehearsed.root / TARGET
    file.write_text(file.read_text() + "# and mine\n")
    kept = {each.subject: each.outcome for each in undo_all(rehearsed.state)}
    assert kept[f"/{TARGET}"] == "kept"


def test_netplan_files_shown_hide_secrets() -> None:
    content = "password: one two\n- 'psk': \"three\"\n{auth: {password: four, x: y}}\nkeys:\n  private: five\n"
    text = files.shown({"/etc/netplan/w.yaml": content.encode()})
    assert not [word for word in ("one", "two", "three", "four", "five") if word in text]


def test_restore_in_a_rehearsal_does_nothing(rehearsed: Rehearsed) -> None:
    undo = Undo("netplan", "the QSFP link", {"lo": {"mtu": 1, "up": False, "addresses": []}}, {})
    assert restore([undo], rehearsed.state.system).outcome == "nothing"


WORDS = st.text("ab: #{[-'\"\\\n\té&*!|>%@", max_size=8)
LEAVES = st.one_of(WORDS, st.booleans(), st.integers(-9, 9), st.none())
FIELDS = st.dictionaries(st.sampled_from(["dhcp4", "routes", "x"]), st.one_of(LEAVES, st.lists(LEAVES)), max_size=3)
OTHERS = st.dictionaries(WORDS.map(lambda word: "o" + word), FIELDS, max_size=3)


@settings(max_examples=60, deadline=None)
@given(OTHERS, FIELDS, st.one_of(st.none(), OTHERS))
def test_netplan_file_keeps_the_entries_of_others(others: dict[str, Any], ours: dict[str, Any], wifis: Any) -> None:
    said = {"version": 2, "renderer": "networkd", "ethernets": {**others, FIRST: ours}, "wifis": wifis or {"w": {}}}
    content = yaml.safe_dump({"network": said}, allow_unicode=True).encode()
    kept = {**said, "ethernets": others} if others else {name: said[name] for name in ("version", "renderer", "wifis")}
    elsewhere = files.without(files.NetplanFile("/etc/netplan/x.yaml", content), [("ethernets", FIRST)])
    assert yaml.safe_load(elsewhere or b"") == {"network": kept}
    former = files.NetplanFile(f"/{TARGET}", content)
    half = files.Half(FIRST, IPv4Interface("192.168.100.10/24"), 9000)
    joined = yaml.safe_load(files.rendered([half], "networkd", former, {FIRST}))["network"]
    assert joined["ethernets"].pop(FIRST)["mtu"] == 9000
    assert joined == {**kept, "ethernets": others}


@settings(max_examples=100, deadline=None)
@given(
    st.binary(max_size=80), st.sampled_from([b"", b"network:\n ethernets:\n  ", b"network: {ethernets: {a: {match: "])
)
def test_netplan_file_of_any_bytes_is_read_or_conflicts(tail: bytes, head: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder, "etc/netplan")
        there.mkdir(parents=True)
        (there / "x.yaml").write_bytes(head + tail)
        state = Netplan(node()).check(LocalReader(folder))
    assert isinstance(state, Drift | Conflict)


def test_restore_with_this_ssh_session_on_the_link_keeps_the_address(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    was = {FIRST: {"mtu": 1500, "up": True, "addresses": []}}
    ours = Undo("netplan", "the QSFP link", was, {FIRST: "192.0.2.77/24"})
    monkeypatch.setenv("SSH_CONNECTION", "192.0.2.9 50000 192.0.2.77 22")
    with pytest.raises(Blocked, match=f"{FIRST} was kept: this ssh session uses its address"):
        restore([ours], Untouchable(str(tmp_path)))


class Untouchable(LocalSystem):
    """A node on which no program may run."""

    @property
    def rehearsal(self) -> bool:
        return False

    def ask(self, *argv: str, **_: Any) -> Any:
        raise AssertionError(argv)
