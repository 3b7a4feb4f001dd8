"""Bandwidth and link probes: verdicts on published figures, and what the output of the programs means.

The output of iperf3 was recorded on a loopback. The rows of ib_write_bw have the form of
github.com/linux-rdma/perftest/issues/234, since no RDMA device was available.
"""

import json
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
from tests.support.local_server import free_port
from tests.support.machine import Machine, OnASpark
from tests.support.nodes import node_with
from tests.support.sysfs import Sysfs, card, spark

FIRST, SECOND = "enp1s0f0np0", "enP2p1s0f0np0"
HCAS = ("rocep1s0f0", "roceP2p1s0f0")


@pytest.fixture
def tmp_path(in_memory: Path) -> Path:
    return in_memory


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
def test_judged_published_figures_get_their_verdict(measured: Measured, verdict: str, begins: str) -> None:
    found = bandwidth.judged(measured)
    assert (found.verdict, found.found.startswith(begins)) == (verdict, True), found
    assert bool(found.hint) == (verdict != "pass")


def test_judged_chosen_sockets_are_no_warning() -> None:
    assert bandwidth.judged(gathered(3.5, "Socket"), "socket").verdict == "pass"
    assert bandwidth.judged(gathered(1.6, "Socket"), "socket").verdict == "fail"
    assert bandwidth.judged(gathered(23.7), "socket").verdict == "pass"


def test_judged_slower_half_is_named() -> None:
    assert f"{SECOND} reaches a fraction" in bandwidth.judged(halves("tcp", 60.0, 2.0)).found


def test_judged_errors_during_the_measurement_are_a_warning() -> None:
    clean = halves("rdma", 94.93, 94.92)
    found = bandwidth.judged(replace(clean, lost={"spark-2": {f"{FIRST} out_of_sequence": 12}}))
    assert found.verdict == "warn"
    assert "on spark-2" in found.found and "out_of_sequence 12" in found.found


@given(st.sampled_from(bandwidth.KINDS), st.floats(0, 500), st.floats(0, 500), st.sampled_from(["IB", "Socket", ""]))
def test_judged_higher_figure_never_has_a_worse_verdict(kind: Kind, one: float, other: float, network: str) -> None:
    low, high = sorted((one, other))
    each = [gathered(gb / 8, network) if kind == "nccl" else halves(kind, gb / 2, gb / 2) for gb in (low, high)]
    order = ("fail", "warn", "pass")
    first, second = (order.index(bandwidth.judged(measured).verdict) for measured in each)
    assert first <= second


# --- the output of the programs

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


def test_understood_iperf_output_gives_the_rate_of_each_half() -> None:
    output = {FIRST: (json.dumps(IPERF), ""), SECOND: (json.dumps(IPERF), "")}
    measured = bandwidth.understood("tcp", output)
    assert measured.halves == {FIRST: pytest.approx(46.58, abs=0.01), SECOND: pytest.approx(46.58, abs=0.01)}


def test_understood_refused_connection_names_its_half() -> None:
    output = {FIRST: (json.dumps(IPERF), ""), SECOND: (json.dumps(REFUSED), "")}
    found = bandwidth.judged(bandwidth.understood("tcp", output))
    assert found.verdict == "fail"
    assert found.found.startswith(SECOND) and found.found.endswith("Connection refused")


def test_understood_ib_write_bw_output_gives_rates_or_the_cause() -> None:
    output = {HCAS[0]: (PERFTEST, ""), HCAS[1]: (PERFTEST, "")}
    assert bandwidth.judged(bandwidth.understood("rdma", output)).verdict == "pass"
    no_memory = {**output, HCAS[1]: ("", "Couldn't allocate MR\n failed to create mr\nFailed to create MR\n")}
    assert bandwidth.understood("rdma", no_memory).why == f"{HCAS[1]}: Failed to create MR"


def test_understood_nccl_output_gives_the_bandwidth_or_the_cause() -> None:
    measured = bandwidth.understood("nccl", {"nccl": (GATHERED, "")})
    assert (measured.network, measured.size) == ("Socket", 1 << 28)
    assert measured.bus == pytest.approx(3.71, abs=0.01)
    damaged = GATHERED.replace('"right": true', '"right": false')
    assert "damaged" in bandwidth.understood("nccl", {"nccl": (damaged, "")}).why
    nothing = bandwidth.understood("nccl", {"nccl": ("", "torch sees no GPU\n")})
    assert nothing.why == "torch sees no GPU"


@given(st.text(), st.text())
def test_understood_arbitrary_output_fails(out: str, err: str) -> None:
    for kind in bandwidth.KINDS:
        output = {"nccl": (out, err)} if kind == "nccl" else {FIRST: (out, err), SECOND: (out, err)}
        assert bandwidth.judged(bandwidth.understood(kind, output)).verdict == "fail"


# --- the limits of a measurement


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
def test_size_is_a_small_part_of_the_free_memory(available: int, wanted: int) -> None:
    assert bandwidth.size(available) == wanted


def test_programs_have_a_time_limit_and_bind_to_the_link(tmp_path: Path) -> None:
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


def test_programs_of_the_asking_side_connect_to_the_same_half(tmp_path: Path) -> None:
    on, node = OnASpark(tree(tmp_path).root, {}), node_with()
    first, second = bandwidth.programs(node, on, "rdma", (29699, 29698), "192.168.100.11")
    assert (first.over, first.argv[-1]) == (HCAS[0], "192.168.100.11")
    assert (second.over, second.argv[-1]) == (HCAS[1], "192.168.101.11")
    assert first.argv[first.argv.index("-x") + 1] == "3"
    tcp = bandwidth.programs(node, on, "tcp", (29699, 29698), "192.168.100.11")
    assert [each.argv[each.argv.index("-c") + 1] for each in tcp] == ["192.168.100.11", "192.168.101.11"]


@pytest.mark.parametrize("peer", ["", "192.168.100.11"])
@pytest.mark.parametrize("kind", bandwidth.KINDS)
def test_programs_are_on_the_list_of_read_only_commands(tmp_path: Path, kind: Kind, peer: str) -> None:
    on = OnASpark(tree(tmp_path).root, {})
    for program in bandwidth.programs(node_with(), on, kind, (29699, 29698), peer):
        assert read_only.allows(program.argv), program.argv


# --- on one node


def found_on(tmp_path: Path, name: str, programs: Mapping[str, str], **settings: object) -> tuple[str, str]:
    on, node = OnASpark(tmp_path, programs), node_with(**settings)
    chosen = checks.chosen(node, only=[name])
    (result,) = [each for each in checks.look(chosen.probes, on, lambda _: None) if each.name == name]
    return result.verdict, result.found


def test_bandwidth_on_one_node_is_skipped_with_the_reason(tmp_path: Path) -> None:
    tree(tmp_path)
    assert found_on(tmp_path, "tcp-bandwidth", {}) == (
        "skip",
        "iperf3 is not installed: `sudo apt-get install iperf3`",
    )
    verdict, found = found_on(tmp_path, "tcp-bandwidth", {"iperf3": ""})
    assert verdict == "skip"
    assert "`sparkinstall cluster verify --level link --measure spark-1 spark-2`" in found
    assert "apt-get install perftest" in found_on(tmp_path, "rdma-bandwidth", {})[1]
    assert "no GPU" in found_on(tmp_path, "nccl-bandwidth", {})[1]


def test_peers_without_an_address_of_this_node_fails_for_this_node(tmp_path: Path) -> None:
    tree(tmp_path)
    first = {"ifname": FIRST, "addr_info": [{"family": "inet", "local": "192.168.100.10", "prefixlen": 24}]}
    pair = {"cluster__workers": ["192.168.100.11"]}
    found = found_on(tmp_path, "peers", {"ip": json.dumps([first])}, **pair)
    assert found == ("fail", "this node's own address is not configured: 192.168.101.10")
    own = [{"family": "inet", "local": "192.168.101.10", "prefixlen": 24}]
    both = json.dumps([first, {"ifname": SECOND, "addr_info": own}])
    assert found_on(tmp_path, "peers", {"ip": both, "ping": ""}, **pair)[0] == "pass"
    # Where `ip` lists nothing, this node's addresses are not judged.
    assert "does not answer" in found_on(tmp_path, "peers", {"ip": "[]"}, **pair)[1]


def test_bandwidth_without_measure_is_not_chosen() -> None:
    names = {probe.name for probe in checks.chosen(node_with()).probes}
    assert not names & {"tcp-bandwidth", "rdma-bandwidth", "nccl-bandwidth"}
    assert {"link-health", "gids"} <= names
    measured = {probe.name for probe in checks.chosen(node_with(), measure=True).probes}
    assert measured - names >= {"tcp-bandwidth", "rdma-bandwidth", "nccl-bandwidth"}
    assert "rdma-bandwidth" not in {
        probe.name for probe in checks.chosen(node_with(network__transport="socket"), measure=True).probes
    }


# --- the link without a load


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


def test_link_health_of_a_healthy_link_passes(healthy: Sysfs) -> None:
    verdict, found = found_on(healthy.root, "link-health", {})
    assert (verdict, found) == ("pass", "PCIe x4 at 32 GT/s, firmware 28.45.4028, no errors since the boot")
    counters(healthy, FIRST, rx_crc_errors=7)
    assert "few errors since the boot (enp1s0f0np0 rx_crc_errors 7)" in found_on(healthy.root, "link-health", {})[1]


def test_link_health_names_the_lanes_of_each_half(healthy: Sysfs) -> None:
    card(healthy, SECOND, lanes="2", rate="16.0 GT/s PCIe")
    assert found_on(healthy.root, "link-health", {})[1].startswith("PCIe x2 at 16 GT/s, PCIe x4 at 32 GT/s, ")


def test_link_health_half_duplex_is_a_warning(healthy: Sysfs) -> None:
    (healthy.root / "sys/class/net" / SECOND / "duplex").write_text("half\n")
    assert found_on(healthy.root, "link-health", {}) == ("warn", f"{SECOND} runs half duplex")


def test_link_health_many_errors_since_the_boot_are_a_warning(healthy: Sysfs) -> None:
    counters(healthy, FIRST, rx_crc_errors=101)
    verdict, found = found_on(healthy.root, "link-health", {})
    assert verdict == "warn" and "rx_crc_errors 101: frames arrive damaged" in found
    counters(healthy, FIRST, rx_packets=1_000_000_000)
    assert found_on(healthy.root, "link-health", {})[0] == "pass"


def test_link_health_growing_errors_are_a_warning(healthy: Sysfs, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = healthy.root / f"sys/class/infiniband/{HCAS[1]}/ports/1/hw_counters"
    folder.mkdir()
    (folder / "out_of_sequence").write_text("5\n")
    now = folder / "out_of_sequence"
    monkeypatch.setattr("sparkinstall.probes.link.time.sleep", lambda _: now.write_text("9\n"))
    verdict, found = found_on(healthy.root, "link-health", {})
    assert verdict == "warn"
    assert found == (
        f"growing within a second: {SECOND} out_of_sequence 4: RDMA packets to this node are lost on the way"
    )


def test_link_health_different_firmware_is_a_warning(healthy: Sysfs) -> None:
    card(healthy, SECOND, version="28.40.1000")
    verdict, found = found_on(healthy.root, "link-health", {})
    assert verdict == "warn" and "different firmware" in found


def test_link_health_reads_firmware_and_fec_from_ethtool(tmp_path: Path) -> None:
    output = "driver: mlx5_core\nfirmware-version: 28.45.4028 (NVD0000000087)\nActive FEC encoding: RS\n"
    node = tree(tmp_path)
    counters(node, FIRST, rx_packets=1)
    verdict, found = found_on(tmp_path, "link-health", {"ethtool": output})
    assert (verdict, found) == ("pass", "FEC RS, firmware 28.45.4028 (NVD0000000087), no errors since the boot")


# --- GIDs


def decide(node: Sysfs, transport: str) -> None:
    (node.root / "opt/sparkinstall").mkdir(parents=True, exist_ok=True)
    (node.root / "opt/sparkinstall/transport.json").write_text(json.dumps({"transport": transport}))


def test_gids_of_both_halves_pass(tmp_path: Path) -> None:
    node = tree(tmp_path)
    assert found_on(tmp_path, "gids", {})[0] == "skip"
    decide(node, "roce")
    assert found_on(tmp_path, "gids", {}) == (
        "pass",
        f"{HCAS[0]} index 3: 192.168.100.10, {HCAS[1]} index 3: 192.168.101.10",
    )


def test_gids_of_another_address_fail(tmp_path: Path) -> None:
    node = tree(tmp_path)
    decide(node, "roce")
    found = found_on(tmp_path, "gids", {}, cluster__head="192.168.100.20", cluster__workers=["192.168.100.21"])
    assert found == ("fail", f"{HCAS[0]} has no RoCE v2 GID for 192.168.100.20")
    (tmp_path / f"sys/class/infiniband/{HCAS[1]}/ports/1/state").write_text("1: DOWN\n")
    assert found_on(tmp_path, "gids", {})[0] == "fail"


def test_gids_with_sockets_pass(tmp_path: Path) -> None:
    decide(tree(tmp_path), "socket")
    assert found_on(tmp_path, "gids", {})[0] == "pass"


def test_nccl_program_sources_the_env_file_and_listens(tmp_path: Path) -> None:
    """What a machine without a GPU can show: the env file is sourced, and the answering side listens first."""
    tools, env = tmp_path / "bin", tmp_path / "opt/sparkinstall/env/multi-node-head.env"
    tools.mkdir()
    env.parent.mkdir(parents=True)
    (tools / "python").symlink_to(sys.executable)
    (tmp_path / "torch.py").write_text("import sys; sys.exit(open('/proc/net/tcp').read())\n")
    env.write_text(f'export PATH="{tools}:$PATH" PYTHONPATH="{tmp_path}"\n')
    port = free_port()
    (program,) = bandwidth.programs(node_with(), Machine(str(tmp_path)), "nccl", (port,))
    argv = ["127.0.0.1" if word == "192.168.100.10" else word for word in program.argv]
    run = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)
    assert f"0100007F:{port:04X} 00000000:0000 0A" in run.stderr, run.stderr
