"""What is made of figures: the verdicts against those of the field, and what the programs' own words say.

What iperf3 says here it has really said, on a loopback. The rows of ib_write_bw have the form of
github.com/linux-rdma/perftest/issues/234: there is no RDMA device here to ask.
"""

import json
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from sparkinstall.core import checks
from sparkinstall.probes import bandwidth, link
from sparkinstall.probes.bandwidth import Kind, Measured
from sparkinstall.system import read_only
from tests.support.machine import Machine, OnASpark
from tests.support.nodes import node_with
from tests.support.sysfs import Sysfs, card, spark

FIRST, SECOND = "enp1s0f0np0", "enP2p1s0f0np0"
HCAS = ("rocep1s0f0", "roceP2p1s0f0")
HEAD = {"cluster.role": "head"}


@pytest.fixture(autouse=True)
def no_ssh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSH_CONNECTION", raising=False)
    monkeypatch.setattr(link, "_PAUSE", 0.0)


def tree(tmp_path: Path) -> Sysfs:
    return spark(tmp_path)


# --- the verdicts


def halves(kind: Kind, *carried: float) -> Measured:
    names = HCAS if kind == "rdma" else (FIRST, SECOND)
    return Measured(kind, dict(zip(names, carried, strict=True)))


def gathered(bus: float, network: str = "IB") -> Measured:
    return Measured("nccl", {}, bus, 1 << 30, network)


@pytest.mark.parametrize(
    ("measured", "verdict", "begins"),
    [
        # ib_write_bw: both halves 189.85 Gb/s, one 98, a degraded card 13.
        (halves("rdma", 94.93, 94.92), "pass", "both halves"),
        (halves("rdma", 98.0, 0.0), "fail", "one half"),
        (halves("rdma", 0.1, 97.28), "fail", "one half"),
        (halves("rdma", 49.0, 49.0), "fail", "no more than a single half"),
        (halves("rdma", 6.6, 6.63), "fail", "a degraded card"),
        (halves("rdma", 13.23, 13.23), "fail", "a degraded card"),
        (halves("rdma", 75.0, 75.0), "warn", "less than both"),
        # TCP, untuned: 96 Gb/s; 92.57 over one half alone, and a degraded card 12.86.
        (halves("tcp", 48.0, 48.0), "pass", "both halves"),
        (halves("tcp", 92.57, 0.0), "fail", "one half"),
        (halves("tcp", 6.43, 6.43), "fail", "a degraded card"),
        (halves("tcp", 30.0, 25.0), "warn", "less than both"),
        # NCCL: 18.9 to 23.7 GB/s, NVIDIA's pass mark 21.875, one half of 25.
        (gathered(23.7), "pass", "both halves"),
        (gathered(21.875), "pass", "both halves"),
        (gathered(21.87), "warn", "both halves, below the pass mark"),
        (gathered(18.9), "warn", "both halves, below the pass mark"),
        (gathered(15.0), "warn", "less than others"),
        (gathered(12.2), "fail", "no more than a single half"),
        (gathered(3.04), "fail", "a degraded card, or a wrong NCCL"),
        (gathered(1.6), "fail", "a degraded card"),
        (gathered(11.0, "Socket"), "warn", "sockets"),
        (gathered(3.5, "Socket"), "warn", "sockets"),
        (gathered(1.6, "Socket"), "fail", "a degraded card"),
    ],
)
def test_the_figures_of_the_field(measured: Measured, verdict: str, begins: str) -> None:
    found = bandwidth.judged(measured)
    assert (found.verdict, found.found.startswith(begins)) == (verdict, True), found
    assert bool(found.hint) == (verdict != "pass")


def test_sockets_that_were_asked_for_are_no_warning() -> None:
    assert bandwidth.judged(gathered(3.5, "Socket"), "socket").verdict == "pass"
    assert bandwidth.judged(gathered(1.6, "Socket"), "socket").verdict == "fail"
    assert bandwidth.judged(gathered(23.7), "socket").verdict == "pass"


def test_the_half_that_carries_less_is_named() -> None:
    assert f"{SECOND} reaches a fraction" in bandwidth.judged(halves("tcp", 60.0, 2.0)).found


def test_errors_that_grew_meanwhile_are_a_warning() -> None:
    clean = halves("rdma", 94.93, 94.92)
    found = bandwidth.judged(replace(clean, lost={"spark-2": {f"{FIRST} out_of_sequence": 12}}))
    assert found.verdict == "warn"
    assert "on spark-2" in found.found and "out_of_sequence 12" in found.found


@given(st.sampled_from(bandwidth.KINDS), st.floats(0, 500), st.floats(0, 500), st.sampled_from(["IB", "Socket", ""]))
def test_there_is_a_verdict_on_every_figure_and_more_is_never_worse(
    kind: Kind, some: float, more: float, network: str
) -> None:
    low, high = sorted((some, more))
    each = [gathered(gb / 8, network) if kind == "nccl" else halves(kind, gb / 2, gb / 2) for gb in (low, high)]
    order = ("fail", "warn", "pass")
    first, second = (order.index(bandwidth.judged(one).verdict) for one in each)
    assert first <= second


# --- what the programs say

IPERF = {
    "start": {"version": "iperf 3.18"},
    "end": {
        "sum_sent": {"seconds": 1.001472, "bytes": 5822349312, "bits_per_second": 46510331288.34356},
        "sum_received": {"seconds": 1.001364, "bytes": 5830344704, "bits_per_second": 46579223571.0491},
    },
}
REFUSED = {
    "start": {"connected": [], "version": "iperf 3.18"},
    "intervals": [],
    "end": {},
    "error": "unable to connect to server - server may have stopped running or use a different port, firewall issue, "
    "etc.: Connection refused",
}
PERFTEST = """\
---------------------------------------------------------------------------------------
 local address: LID 0000 QPN 0x0108 PSN 0x63ad7d RKey 0x17eedf VAddr 0x007f760c947000
 GID: 00:00:00:00:00:00:00:00:00:00:255:255:10:255:255:05
---------------------------------------------------------------------------------------
 #bytes     #iterations    BW peak[Gb/sec]    BW average[Gb/sec]   MsgRate[Mpps]
 65536      905213           0.00               94.92              0.181045
---------------------------------------------------------------------------------------
"""
GATHERED = """\
vm:625:625 [0] NCCL INFO Failed to initialize NET plugin IB
vm:625:625 [0] NCCL INFO NET/Socket : Using [0]lo:127.0.0.1<0>
vm:625:625 [0] NCCL INFO Initialized NET plugin Socket
vm:625:625 [0] NCCL INFO Assigned NET plugin Socket to comm
vm:625:625 [0] NCCL INFO Using network Socket
{"bus": 3.710443270211361, "size": 268435456, "right": true}
vm:625:625 [0] NCCL INFO ENV/Plugin: Closing env plugin ncclEnvDefault
"""


def test_what_iperf_says() -> None:
    said = {FIRST: (json.dumps(IPERF), ""), SECOND: (json.dumps(IPERF), "")}
    measured = bandwidth.understood("tcp", said)
    assert measured.halves == {FIRST: pytest.approx(46.58, abs=0.01), SECOND: pytest.approx(46.58, abs=0.01)}


def test_a_connection_that_is_refused_is_told_with_its_half() -> None:
    said = {FIRST: (json.dumps(IPERF), ""), SECOND: (json.dumps(REFUSED), "")}
    found = bandwidth.judged(bandwidth.understood("tcp", said))
    assert found.verdict == "fail"
    assert found.found.startswith(SECOND) and found.found.endswith("Connection refused")


def test_what_ib_write_bw_says() -> None:
    said = {HCAS[0]: (PERFTEST, ""), HCAS[1]: (PERFTEST, "")}
    assert bandwidth.judged(bandwidth.understood("rdma", said)).verdict == "pass"
    no_memory = {**said, HCAS[1]: ("", "Couldn't allocate MR\n failed to create mr\nFailed to create MR\n")}
    assert bandwidth.understood("rdma", no_memory).why == f"{HCAS[1]}: Failed to create MR"


def test_what_nccl_says() -> None:
    measured = bandwidth.understood("nccl", {"nccl": (GATHERED, "")})
    assert (measured.network, measured.size) == ("Socket", 1 << 28)
    assert measured.bus == pytest.approx(3.71, abs=0.01)
    damaged = GATHERED.replace('"right": true', '"right": false')
    assert "damaged" in bandwidth.understood("nccl", {"nccl": (damaged, "")}).why
    nothing = bandwidth.understood("nccl", {"nccl": ("", "torch sees no GPU\n")})
    assert nothing.why == "torch sees no GPU"


@given(st.text(), st.text())
def test_no_words_are_a_crash(out: str, err: str) -> None:
    for kind in bandwidth.KINDS:
        said = {"nccl": (out, err)} if kind == "nccl" else {FIRST: (out, err), SECOND: (out, err)}
        assert bandwidth.judged(bandwidth.understood(kind, said)).verdict == "fail"


# --- how it is made safe


@pytest.mark.parametrize(
    ("available", "wanted"),
    [
        (120 << 30, 1 << 30),
        (16 << 30, 1 << 30),
        (8 << 30, 512 << 20),
        (4 << 30, 256 << 20),
        (4095 << 20, 0),
        (1 << 30, 0),
        (0, 0),
    ],
)
def test_what_nccl_gathers_is_small_beside_what_is_free(available: int, wanted: int) -> None:
    assert bandwidth.size(available) == wanted


def test_every_program_ends_by_itself_and_listens_at_the_link_alone(tmp_path: Path) -> None:
    on, node = OnASpark(tree(tmp_path).root, {}), node_with()
    for kind in ("tcp", "rdma"):
        for number, program in enumerate(bandwidth.programs(node, on, kind, (29699, 29698))):
            own = f"192.168.10{number}.10"
            assert program.argv[:4] == ("timeout", "-k", "2", str(bandwidth.LIMIT))
            bound = "-B" if kind == "tcp" else "--bind_source_ip"
            assert program.argv[program.argv.index(bound) + 1] == own
    (gathering,) = bandwidth.programs(node, on, "nccl", (29699,))
    assert gathering.argv[3] == str(bandwidth.NCCL_LIMIT)
    assert "192.168.100.10" in gathering.argv


def test_the_asking_side_goes_to_the_same_half_of_the_other_node(tmp_path: Path) -> None:
    on, node = OnASpark(tree(tmp_path).root, {}), node_with()
    first, second = bandwidth.programs(node, on, "rdma", (29699, 29698), "192.168.100.11")
    assert (first.over, first.argv[-1]) == (HCAS[0], "192.168.100.11")
    assert (second.over, second.argv[-1]) == (HCAS[1], "192.168.101.11")
    assert first.argv[first.argv.index("-x") + 1] == "3"
    tcp = bandwidth.programs(node, on, "tcp", (29699, 29698), "192.168.100.11")
    assert [each.argv[each.argv.index("-c") + 1] for each in tcp] == ["192.168.100.11", "192.168.101.11"]


@pytest.mark.parametrize("peer", ["", "192.168.100.11"])
@pytest.mark.parametrize("kind", bandwidth.KINDS)
def test_programs_of_a_measurement_are_on_the_list_of_read_only_commands(tmp_path: Path, kind: Kind, peer: str) -> None:
    on = OnASpark(tree(tmp_path).root, {})
    for program in bandwidth.programs(node_with(), on, kind, (29699, 29698), peer):
        assert read_only.allows(program.argv), program.argv


# --- on one node


def found_on(tmp_path: Path, name: str, programs: Mapping[str, str], **settings: object) -> tuple[str, str]:
    on, node = OnASpark(tmp_path, programs), node_with(**settings)
    chosen = checks.chosen(node, only=[name])
    (looked,) = [each for each in checks.look(chosen.probes, on, lambda _: None) if each.probe.name == name]
    return looked.finding.verdict, looked.finding.found


def test_a_node_alone_says_what_is_missing_and_then_that_it_takes_two(tmp_path: Path) -> None:
    tree(tmp_path)
    assert found_on(tmp_path, "tcp-bandwidth", {}) == (
        "skip",
        "iperf3 is not installed: `sudo apt-get install iperf3`",
    )
    verdict, said = found_on(tmp_path, "tcp-bandwidth", {"iperf3": ""})
    assert verdict == "skip"
    assert "`sparkinstall cluster verify --level link --measure spark-1 spark-2`" in said
    assert "apt-get install perftest" in found_on(tmp_path, "rdma-bandwidth", {})[1]
    assert "no GPU" in found_on(tmp_path, "nccl-bandwidth", {})[1]


def test_an_own_address_that_is_missing_is_not_the_other_nodes_fault(tmp_path: Path) -> None:
    tree(tmp_path)
    first = {"ifname": FIRST, "addr_info": [{"family": "inet", "local": "192.168.100.10", "prefixlen": 24}]}
    pair = {"cluster__workers": ["192.168.100.11"]}
    found = found_on(tmp_path, "peers", {"ip": json.dumps([first])}, **pair)
    assert found == ("fail", "this node's own address is not configured: 192.168.101.10")
    own = [{"family": "inet", "local": "192.168.101.10", "prefixlen": 24}]
    both = json.dumps([first, {"ifname": SECOND, "addr_info": own}])
    assert found_on(tmp_path, "peers", {"ip": both, "ping": ""}, **pair)[0] == "pass"
    # `ip` that tells nothing accuses nobody.
    assert "does not answer" in found_on(tmp_path, "peers", {"ip": "[]"}, **pair)[1]


def test_only_who_asks_for_it_is_measured() -> None:
    names = {probe.name for probe in checks.chosen(node_with()).probes}
    assert not names & {"tcp-bandwidth", "rdma-bandwidth", "nccl-bandwidth"}
    assert {"link-health", "gids"} <= names
    measured = {probe.name for probe in checks.chosen(node_with(), measure=True).probes}
    assert measured - names >= {"tcp-bandwidth", "rdma-bandwidth", "nccl-bandwidth"}
    assert "rdma-bandwidth" not in {
        probe.name for probe in checks.chosen(node_with(network__transport="socket"), measure=True).probes
    }


# --- what the link says without a load


def counters(node: Sysfs, half: str, **counts: int) -> None:
    folder = node.root / "sys/class/net" / half / "statistics"
    folder.mkdir(exist_ok=True)
    for name, count in counts.items():
        (folder / name).write_text(f"{count}\n")


@pytest.fixture
def healthy(tmp_path: Path) -> Sysfs:
    node = tree(tmp_path)
    for half in (FIRST, SECOND):
        card(node, half)
        counters(node, half, rx_packets=10_000_000, rx_crc_errors=0, rx_errors=0)
    return node


def test_a_healthy_link(healthy: Sysfs) -> None:
    verdict, said = found_on(healthy.root, "link-health", {})
    assert (verdict, said) == ("pass", "PCIe x4 at 32 GT/s, firmware 28.45.4028, no errors since the boot")
    counters(healthy, FIRST, rx_crc_errors=7)
    assert "few errors since the boot (enp1s0f0np0 rx_crc_errors 7)" in found_on(healthy.root, "link-health", {})[1]


def test_the_lanes_of_each_half_are_told(healthy: Sysfs) -> None:
    card(healthy, SECOND, lanes="2", rate="16.0 GT/s PCIe")
    assert found_on(healthy.root, "link-health", {})[1].startswith("PCIe x2 at 16 GT/s, PCIe x4 at 32 GT/s, ")


def test_half_duplex(healthy: Sysfs) -> None:
    (healthy.root / "sys/class/net" / SECOND / "duplex").write_text("half\n")
    assert found_on(healthy.root, "link-health", {}) == ("warn", f"{SECOND} runs half duplex")


def test_many_errors_since_the_boot(healthy: Sysfs) -> None:
    counters(healthy, FIRST, rx_crc_errors=101)
    verdict, said = found_on(healthy.root, "link-health", {})
    assert verdict == "warn" and "rx_crc_errors 101: frames arrive damaged" in said
    counters(healthy, FIRST, rx_packets=1_000_000_000)
    assert found_on(healthy.root, "link-health", {})[0] == "pass"


def test_errors_that_grow_while_it_is_looked(healthy: Sysfs, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = healthy.root / f"sys/class/infiniband/{HCAS[1]}/ports/1/hw_counters"
    folder.mkdir()
    (folder / "out_of_sequence").write_text("5\n")
    now = folder / "out_of_sequence"
    monkeypatch.setattr("sparkinstall.probes.link.time.sleep", lambda _: now.write_text("9\n"))
    verdict, said = found_on(healthy.root, "link-health", {})
    assert verdict == "warn"
    assert said == f"growing within a second: {SECOND} out_of_sequence 4: RDMA packets to this node are lost on the way"


def test_halves_with_different_firmware(healthy: Sysfs) -> None:
    card(healthy, SECOND, version="28.40.1000")
    verdict, said = found_on(healthy.root, "link-health", {})
    assert verdict == "warn" and "different firmware" in said


def test_firmware_and_fec_as_ethtool_tells_them(tmp_path: Path) -> None:
    said = "driver: mlx5_core\nfirmware-version: 28.45.4028 (NVD0000000087)\nActive FEC encoding: RS\n"
    node = tree(tmp_path)
    counters(node, FIRST, rx_packets=1)
    verdict, found = found_on(tmp_path, "link-health", {"ethtool": said})
    assert (verdict, found) == ("pass", "FEC RS, firmware 28.45.4028 (NVD0000000087), no errors since the boot")


# --- GIDs


def decided(node: Sysfs, transport: str) -> None:
    (node.root / "opt/sparkinstall").mkdir(parents=True, exist_ok=True)
    (node.root / "opt/sparkinstall/transport.json").write_text(json.dumps({"transport": transport}))


def test_each_half_has_its_gid(tmp_path: Path) -> None:
    node = tree(tmp_path)
    assert found_on(tmp_path, "gids", {})[0] == "skip"
    decided(node, "roce")
    assert found_on(tmp_path, "gids", {}) == (
        "pass",
        f"{HCAS[0]} index 3: 192.168.100.10, {HCAS[1]} index 3: 192.168.101.10",
    )


def test_a_gid_of_another_address_is_a_failure(tmp_path: Path) -> None:
    node = tree(tmp_path)
    decided(node, "roce")
    found = found_on(tmp_path, "gids", {}, cluster__head="192.168.100.20", cluster__workers=["192.168.100.21"])
    assert found == ("fail", f"{HCAS[0]} has no RoCE v2 GID for 192.168.100.20")
    (tmp_path / f"sys/class/infiniband/{HCAS[1]}/ports/1/state").write_text("1: DOWN\n")
    assert found_on(tmp_path, "gids", {})[0] == "fail"


def test_sockets_need_no_gid(tmp_path: Path) -> None:
    decided(tree(tmp_path), "socket")
    assert found_on(tmp_path, "gids", {})[0] == "pass"


def test_nccl_is_asked_in_the_environment_of_the_env_file(tmp_path: Path) -> None:
    """As far as a machine without a GPU can go: what is sourced, and that the side that answers listens first."""
    tools, env = tmp_path / "bin", tmp_path / "opt/sparkinstall/env/multi-node-head.env"
    tools.mkdir()
    env.parent.mkdir(parents=True)
    (tools / "python").symlink_to(sys.executable)
    (tmp_path / "torch.py").write_text("import sys; sys.exit(open('/proc/net/tcp').read())\n")
    env.write_text(f'export PATH="{tools}:$PATH" PYTHONPATH="{tmp_path}"\n')
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (program,) = bandwidth.programs(node_with(), Machine(str(tmp_path)), "nccl", (port,))
    argv = ["127.0.0.1" if word == "192.168.100.10" else word for word in program.argv]
    said = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert f"0100007F:{port:04X} 00000000:0000 0A" in said.stderr, said.stderr
