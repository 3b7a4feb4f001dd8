"""The firewall's rules as nft reads them, and what counts as another program's firewall."""

import json
import os
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkinstall import config as configuration
from sparkinstall.config import Layer
from sparkinstall.core import engine
from sparkinstall.errors import BadConfig, Problem
from sparkinstall.facts import network, packet_filters
from sparkinstall.node import Node
from sparkinstall.resources import Drift, NodeOnly, firewall, rollback
from sparkinstall.stacks import load
from sparkinstall.steps.firewall import Firewall
from sparkinstall.system.local import LocalReader
from tests.support.recording import RecordingSystem

LINK = "192.168.100.0/24, 192.168.101.0/24"
TWINS = '"enp1s0f0np0", "enP2p1s0f0np0"'
ALONE = ("unshare", "--map-root-user", "--net")


def _node(**settings: Any) -> Node:
    values = {name.replace("__", "."): value for name, value in settings.items()}
    chosen, _ = configuration.build([Layer("a test", values)])
    return Node(chosen, load("0.18.1"), "aarch64", "aarch64", True, False, "/home/spark", Path("/home/spark/.cache"))


def _rules(root: Path, node: Node) -> list[str]:
    lines = [line.strip() for line in firewall.rules(node, LocalReader(str(root))).splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def nft() -> str:
    """nft, where it can run without changing this machine."""
    if not os.access(packet_filters.NFT, os.X_OK):
        pytest.skip("no nft (apt-get install nftables)")
    if subprocess.run([*ALONE, packet_filters.NFT, "list", "tables"], capture_output=True).returncode:
        pytest.skip("no user namespaces for an ordinary user here")
    return packet_filters.NFT


def _listed(nft: str, *rulesets: str) -> str:
    """Load `rulesets` into nft, and return its JSON listing."""
    script = 'nft=$1; shift; for each; do "$nft" "$each" || exit 1; done; "$nft" -j list ruleset'
    # nft requires a line break after each chain.
    texts = [each.replace("; }", "; }\n") for each in rulesets]
    answer = subprocess.run([*ALONE, "sh", "-c", script, "sh", nft, *texts], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


HEAD = {"cluster__role": "head"}
LAN = "198.51.100.0/24"
NODES = [
    HEAD,
    {"cluster__role": "worker", "cluster__executor": "mp"},
    {**HEAD, "serving__allow": LAN, "serving__port": 10500},
    {**HEAD, "serving__allow": "198.51.100.0/255.255.255.0"},
    {**HEAD, "network__prefix_length": 30, "network__twin_subnet": "10.0.0.0", "cluster__head": "10.9.8.9"},
    {**HEAD, "cluster__ray_port": 29501, "serving__port": 29501},
    {**HEAD, "network__interface": "enP2p1s0f1np1"},
    {"serving__allow": LAN},
]


@pytest.mark.parametrize("settings", NODES, ids=str)
def test_rules_are_accepted_by_nft(tmp_path: Path, nft: str, settings: dict[str, Any]) -> None:
    text = firewall.rules(_node(**settings), LocalReader(str(tmp_path)))
    found = json.loads(_listed(nft, text, text))["nftables"]
    assert [each["table"]["name"] for each in found if "table" in each] == ["sparkinstall"]
    assert all(each["chain"]["policy"] == "accept" for each in found if "chain" in each)
    rules = [each["rule"]["expr"] for each in found if "rule" in each and each["rule"]["chain"] == "input"]
    drops = [index for index, rule in enumerate(rules) if {"drop": None} in rule]
    assert drops[0] > 2
    assert drops[-1] == len(rules) - 1


def test_rules_accept_ssh_before_any_drop(tmp_path: Path) -> None:
    rules = _rules(tmp_path, _node(**HEAD))
    ssh = rules.index("tcp dport { 22 } accept")
    assert ssh < min(index for index, rule in enumerate(rules) if rule.endswith("drop"))
    assert rules[ssh - 2 : ssh] == ['iifname "lo" accept', "ct state established,related accept"]


def test_rules_accept_the_peer_and_close_the_link_to_others(tmp_path: Path) -> None:
    rules = _rules(tmp_path, _node(**HEAD))
    peer = rules.index(f"iifname {{ {TWINS} }} ip saddr {{ {LINK} }} accept")
    ping = rules.index("meta l4proto { icmp, ipv6-icmp } accept")
    spoofed, link = (rules.index(f"ip {which} {{ {LINK} }} drop") for which in ("saddr", "daddr"))
    assert peer < ping < spoofed < link
    (closed,) = [rule for rule in rules if rule.startswith("tcp dport") and rule.endswith("drop")]
    for port in (6379, 8000, 8265, 10001, 29501):
        assert _closes(closed, port), port
    assert not _closes(closed, 22)


def test_rules_change_no_other_table(tmp_path: Path) -> None:
    text = "\n".join(_rules(tmp_path, _node(**HEAD)))
    assert "flush" not in text
    assert text.count("table") == text.count("table inet sparkinstall") == 3


def test_rules_with_serving_allow_open_only_the_api(tmp_path: Path) -> None:
    rules = _rules(tmp_path, _node(**HEAD, serving__allow=LAN))
    opened = rules.index(f"ip saddr {LAN} tcp dport 8000 accept")
    assert rules[opened - 1] == f"ip daddr {{ {LINK} }} drop"
    assert _closes(rules[opened + 1], 8000)


def test_rules_of_a_single_node_close_only_the_api(tmp_path: Path) -> None:
    rules = _rules(tmp_path, _node(serving__allow=LAN))
    assert [rule for rule in rules if rule.endswith("drop")] == ["tcp dport { 8000 } drop"]
    assert "192.168" not in "\n".join(rules)


def _closes(rule: str, port: int) -> bool:
    ranges = rule[rule.index("{") + 1 : rule.index("}")].split(",")
    ends = [each.strip().partition("-") for each in ranges]
    return any(int(first) <= port <= int(last or first) for first, _, last in ends)


RANGES = st.lists(st.tuples(st.integers(1, 65535), st.integers(0, 20)).map(lambda r: (r[0], min(65535, sum(r)))))


@given(RANGES)
def test_merged_ranges_of_ports_do_not_overlap(ranges: list[tuple[int, int]]) -> None:
    words = [each.partition("-") for each in firewall.merged(ranges)]
    ends = [(int(first), int(last or first)) for first, _, last in words]
    assert {p for first, last in ends for p in range(first, last + 1)} == {
        p for first, last in ranges for p in range(first, last + 1)
    }
    assert all(one[1] + 1 < other[0] for one, other in pairwise(ends))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("serving.allow", "192.168.1.0/33"),
        ("serving.allow", "192.168.1.5/24"),
        ("serving.allow", "0.0.0.0/0"),
        ("serving.allow", "fe80::/10"),
        ("serving.allow", "10.0.0.0/8 } accept; tcp dport { 1"),
        ("serving.allow", "10.0.0.0/8\n"),
        ("serving.port", 0),
        ("serving.port", 65536),
        ("cluster.ray_port", "6379"),
        ("network.interface", 'a" accept #'),
        ("network.twin_subnet", "8.8.8.8"),
        ("firewall.mode", "maybe"),
    ],
)
def test_setting_invalid_in_a_rule_is_refused(name: str, value: Any) -> None:
    with pytest.raises(BadConfig, match=name):
        configuration.build([Layer("a test", {name: value})])


def test_wanted_depends_on_the_role_and_the_settings() -> None:
    wanted = Firewall().wanted
    assert wanted(_node(**HEAD))
    assert wanted(_node(serving__allow=LAN))
    assert wanted(_node(**HEAD, firewall__mode="on"))
    assert not wanted(_node())
    assert not wanted(_node(firewall__mode="on"))
    assert not wanted(_node(**HEAD, firewall__mode="off"))


def test_plan_of_a_rehearsal_shows_the_rules_and_loads_none(tmp_path: Path, nft: str) -> None:
    (report,) = engine.plan([Firewall()], _node(**HEAD), LocalReader(str(tmp_path)))
    assert report.problem is None
    states = {each.key: each for each in report.checked}
    file = states["file:/opt/sparkinstall/firewall.nft"]
    assert isinstance(file, Drift)
    assert f"ip daddr {{ {LINK} }} drop" in file.after
    live = states["nftables:inet sparkinstall"]
    assert isinstance(live, NodeOnly)
    assert shutil.which(nft)
    assert "nft accepts them" in live.reason


INPUT = "chain input { type filter hook input priority 0; policy %s; %s }"
NO_FIREWALL = {
    "nothing": "",
    "docker": """table ip filter { chain DOCKER-USER { drop; }
        chain FORWARD { type filter hook forward priority 0; policy drop; jump DOCKER-USER; } }""",
    "jumps of programs for their own traffic": """table ip filter { chain ts-input { ip saddr 100.64.0.0/10 drop; }
        chain LIBVIRT_INP { udp dport 53 accept; }
        chain INPUT { type filter hook input priority 0; policy accept; jump ts-input; jump LIBVIRT_INP; } }""",
    "fail2ban": "table inet f2b-table { %s }" % (INPUT % ("accept", "tcp dport 22 ip saddr 203.0.113.9 reject;")),
    "only counting": "table inet counts { %s }" % (INPUT % ("accept", "counter; tcp dport 80 accept;")),
    "a chain without a hook": "table inet t { chain unused { drop; } }",
}
FIREWALLS = {
    "policy drop": "table inet mine { %s }" % (INPUT % ("drop", "ct state established accept;")),
    "a last reject": "table ip filter { %s }" % (INPUT % ("accept", "tcp dport 22 accept; reject;")),
    "two jumps away": "table ip6 t { chain b { drop; } chain a { goto b; } %s }" % (INPUT % ("accept", "jump a;")),
    "verdict map": "table inet t { chain in { drop; } %s }"
    % (INPUT % ("accept", 'iifname vmap { "lo" : accept, "eth0" : jump in };')),
}


@pytest.mark.parametrize("ruleset", NO_FIREWALL.values(), ids=NO_FIREWALL)
def test_filtering_chain_is_none_without_a_firewall(nft: str, ruleset: str, tmp_path: Path) -> None:
    ours = firewall.rules(_node(**HEAD), LocalReader(str(tmp_path)))
    assert packet_filters.filtering_chain(_listed(nft, ours, *([ruleset] if ruleset else []))) is None


@pytest.mark.parametrize("ruleset", FIREWALLS.values(), ids=FIREWALLS)
def test_filtering_chain_of_a_firewall_is_found(nft: str, ruleset: str) -> None:
    found = packet_filters.filtering_chain(_listed(nft, ruleset))
    assert found is not None
    assert found[2] == "input"


def test_filtering_chain_with_a_reject_of_iptables_is_found() -> None:
    """The listing is that of nft 1.0.6 after `iptables-nft -A INPUT -j REJECT`."""
    place = {"family": "ip", "table": "filter"}
    hook = {"type": "filter", "hook": "input", "prio": 0, "policy": "accept"}
    reject = {**place, "chain": "INPUT", "expr": [{"counter": {}}, {"xt": {"type": "target", "name": "REJECT"}}]}
    items = [{"chain": {**place, "name": "INPUT", **hook}}, {"rule": reject}]
    assert packet_filters.filtering_chain(json.dumps({"nftables": items})) == ("ip", "filter", "INPUT")
    reject["expr"][1] = {"xt": {"type": "target", "name": "LOG"}}  # type: ignore[index]
    assert packet_filters.filtering_chain(json.dumps({"nftables": items})) is None


LEGACY = "-P INPUT ACCEPT\n-P FORWARD DROP\n-N DOCKER\n-N mine\n-A DOCKER -j DROP\n-A mine -p tcp -j ACCEPT\n"


@pytest.mark.parametrize(
    ("more", "drops"),
    [
        ("-A INPUT -j DOCKER", False),
        ("-A INPUT -j mine", False),
        ("-A INPUT -j mine\n-A mine -j DROP", True),
        ("-A INPUT -p tcp -j REJECT --reject-with tcp-reset", True),
        ("-P INPUT DROP", True),
    ],
)
def test_legacy_drops_follows_the_chains(more: str, drops: bool) -> None:
    assert packet_filters.legacy_drops((LEGACY + more).splitlines()) is drops


LOADED = "/usr/sbin/nft -nn list table inet sparkinstall"


@pytest.mark.parametrize("late", [False, True], ids=["unreachable", "not confirmed in time"])
@pytest.mark.parametrize(
    ("former", "now", "words"),
    [
        ("table a\n", "table a\n", "the former rules are restored"),
        ("table a\n", "table b\n", "the former rules are not (`sudo nft list table inet sparkinstall`"),
        ("", "table b\n", "the former rules are not ("),
        ("", "", "the former rules are restored"),
    ],
)
def test_firewall_that_was_rolled_back_is_compared_with_the_former_rules(
    former: str, now: str, words: str, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(table: str) -> None:
        on.answers["/usr/sbin/nft list tables"] = "table inet sparkinstall\n" if table else ""
        on.answers[LOADED] = table

    def expired(*_: object) -> None:
        loaded(now)
        raise rollback.RolledBack("the firewall change was not confirmed in time: its rollback timer has run")

    def fire(*_: object) -> bool:
        loaded(now)
        return True

    on = RecordingSystem()
    loaded(former)
    for name, does in (("arm", lambda *_, **__: None), ("disarm", expired), ("fire", fire)):
        monkeypatch.setattr(rollback, name, does)
    monkeypatch.setattr(network, "reach", lambda *_: None)
    monkeypatch.setattr(network, "lost", lambda *_: "" if late else "the gateway does not answer")
    with pytest.raises(Problem) as found:
        firewall.LiveTable(_node()).apply(on)
    assert words in found.value.message and found.value.message.startswith("the firewall" if late else "after loading")
