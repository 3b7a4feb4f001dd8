"""Differences between nodes, and measurements between them, as `cluster verify` reports them."""

import json
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from sparkinstall.cluster import drift
from sparkinstall.cluster.drift import comparables, compared
from tests.support.far_nodes import FarNodes
from tests.support.machine import OnASpark
from tests.support.nodes import node_with
from tests.support.sysfs import card, spark
from tests.support.terminal import on_a_terminal

ALIKE = {"vllm": "0.18.1", "torch": "2.10.0", "mtu": "9000 + 9000", "kernel": "6.17.0-1029-nvidia", "env A": "1"}
SITE = "opt/sparkinstall/venv/lib/python3.12/site-packages"
RECORD = "vllm/__init__.py,sha256=aaaa,10\nvllm/version.py,sha256=bbbb,10\n"


# --- the comparison


@pytest.fixture
def tmp_path(in_memory: Path) -> Path:
    return in_memory


def test_compared_equal_nodes_have_no_rows() -> None:
    found = compared({"spark-1": ALIKE, "spark-2": dict(ALIKE)})
    assert (found.rows, found.compared) == ((), len(ALIKE))


@pytest.mark.parametrize(
    ("name", "weight"),
    [("vllm", "fail"), ("torch", "fail"), ("ray", "fail"), ("python", "fail"), ("nccl", "fail"), ("transport", "fail"),
     ("fp8-file", "fail"), ("vllm-files", "fail"), ("mtu", "fail"), ("kernel", "warn"), ("driver", "warn"),
     ("kho", "warn"), ("firmware", "warn"), ("nccl-build-id", "warn"), ("env A", "warn"), ("gid", "note"),
     ("of tomorrow", "note")],
)  # fmt: skip
def test_compared_difference_has_a_weight(name: str, weight: str) -> None:
    (row,) = compared({"a": {**ALIKE, name: "one"}, "b": {**ALIKE, name: "two"}}).rows
    assert (row.name, row.weight, row.values) == (name, weight, {"a": "one", "b": "two"})


def test_compared_missing_value_is_a_difference_and_the_worst_is_first() -> None:
    without = {name: value for name, value in ALIKE.items() if name not in ("kernel", "vllm")}
    found = compared({"a": ALIKE, "b": ALIKE, "c": without})
    assert [(row.name, row.values["c"]) for row in found.rows] == [("vllm", ""), ("kernel", "")]
    assert [row.name for row in found.rows if row.weight == "fail"] == ["vllm"]


def test_kinds_required_before_ray_are_failures() -> None:
    for name in (*drift.PACKAGES, "python", "nccl", "transport"):
        assert drift.KINDS[name].weight == "fail"


# --- the values of a node


@pytest.fixture
def on(tmp_path: Path) -> OnASpark:
    node = spark(tmp_path)
    for half in ("enp1s0f0np0", "enP2p1s0f0np0"):
        card(node, half)
    for name, content in {
        f"{SITE}/vllm-0.18.1.dist-info/RECORD": RECORD,
        "opt/sparkinstall/fp8.json": '{"fallback": true, "why": "so"}',
        "opt/sparkinstall/venv/sparkinstall.json": '{"lock": "feedfacefeedface"}',
        f"{SITE}/vllm/model_executor/layers/quantization/utils/w8a8_utils.py": "patched\n",
        "opt/sparkinstall/env/multi-node-head.env": 'VLLM_HOST_IP="192.168.100.10"\nRAY_X="1.0"\n',
        "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  580.95.05  Release\n",
        "proc/sys/kernel/osrelease": "6.17.0-1029-nvidia\n",
        "proc/cmdline": "BOOT_IMAGE=/boot/vmlinuz root=UUID=1234 ro kho=off\n",
        "etc/dgx-release": 'DGX_OTA_VERSION="7.3.1"\nDGX_OTA_VERSION="7.5.0"\nDGX_SERIAL_NUMBER="1234"\n',
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    return OnASpark(tmp_path, {"ip": "[]"})


def changed(on: OnASpark, name: str, old: str, new: str) -> dict[str, str]:
    """The values of a node that a change of one file changes."""
    before, path = comparables(node_with(), on), Path(on.root, name)
    path.write_text(path.read_text().replace(old, new))
    after = comparables(node_with(), on)
    return {key: after.get(key, "") for key in before.keys() | after.keys() if after.get(key) != before.get(key)}


def test_comparables_list_the_values_of_a_node(on: OnASpark) -> None:
    values = comparables(node_with(), on)
    assert values.items() >= {
        "stack": "0.18.1", "vllm": "0.18.1", "fp8": "fallback on", "mtu": "1500 + 1500", "gid": "3 + 3",
        "firmware": "28.45.4028", "driver": "580.95.05", "kernel": "6.17.0-1029-nvidia", "os": "7.5.0",
        "kho": "kho=off", "env RAY_X": "1.0",
    }.items()  # fmt: skip
    assert "env VLLM_HOST_IP" not in values
    assert "1234" not in json.dumps(values)


def test_compared_each_change_is_one_row(on: OnASpark) -> None:
    record = f"{SITE}/vllm-0.18.1.dist-info/RECORD"
    assert set(changed(on, record, "bbbb", "cccc")) == {"vllm-files"}
    patched = f"{SITE}/vllm/model_executor/layers/quantization/utils/w8a8_utils.py"
    assert set(changed(on, patched, "patched", "by hand")) == {"fp8-file"}
    assert changed(on, "opt/sparkinstall/fp8.json", "true", "false") == {"fp8": "fallback off"}
    env = "opt/sparkinstall/env/multi-node-head.env"
    assert changed(on, env, "1.0", "0.9") == {"env RAY_X": "0.9"}
    assert changed(on, env, "100.10", "100.77") == {}
    mtu = "sys/class/net/enP2p1s0f0np0/mtu"
    assert changed(on, mtu, "1500", "9000") == {"mtu": "1500 + 9000"}
    # The rest of the command line is each node's own, such as the disk that it boots from.
    assert changed(on, "proc/cmdline", "UUID=1234", "UUID=5678") == {}
    assert changed(on, "proc/cmdline", " kho=off", "") == {"kho": "not set"}


def test_comparables_ignore_what_the_installer_writes(on: OnASpark) -> None:
    record = f"{SITE}/vllm-0.18.1.dist-info/RECORD"
    own = "vllm-0.18.1.dist-info/INSTALLER,sha256=x,2\n../../../bin/vllm,sha256=y,9\nvllm/a.pyc,,\n"
    assert changed(on, record, RECORD, own + RECORD) == {}


def test_comparables_unreadable_value_hides_no_other(on: OnASpark) -> None:
    whole = comparables(node_with(), on)

    class Shut(OnASpark):
        def read(self, path: str) -> bytes | None:
            if path in ("/opt/sparkinstall/fp8.json", "/opt/sparkinstall/venv/sparkinstall.json"):
                raise PermissionError(13, "Permission denied", path)
            return super().read(path)

    shut = comparables(node_with(), Shut(Path(on.root), on.programs))
    assert shut == {name: value for name, value in whole.items() if name not in ("fp8", "lock")}


def test_comparables_nccl_is_the_library_itself(on: OnASpark) -> None:
    """The build ID is that of the library, not the one recorded when ours was built."""
    folder = Path(on.root, "opt/sparkinstall/nccl")
    (folder / "lib").mkdir(parents=True)
    (folder / "build.json").write_text('{"build_id": "0123456789abcdef"}')
    source = Path(on.root, "empty.c")
    source.write_text("int nothing;\n")
    build_ids = []
    for build in ("aa" * 20, "bb" * 20):
        target = folder / "lib/libnccl.so.2"
        subprocess.run(["cc", "-shared", f"-Wl,--build-id=0x{build}", "-o", target, source], check=True)
        build_ids.append(comparables(node_with(), on)["nccl-build-id"])
    assert build_ids == ["a" * 12, "b" * 12]
    target.write_bytes(b"no library")
    assert "nccl-build-id" not in comparables(node_with(), on)


# --- `cluster verify`


PEERS = {"name": "peers", "title": "t", "level": "link", "verdict": "pass", "found": "yes", "hint": "", "seconds": 0.1}
ALONE = {**PEERS, "name": "tcp-bandwidth", "verdict": "skip", "found": "it takes both ends"}
CHECK = {"step": "network", "outcome": "unchanged", "seconds": 0.1, "blocked_by": None, "resources": [], "error": None}
ABLE = {"tcp": "", "rdma": "enp1s0f0np0 has no RDMA device", "nccl": "there is no GPU here"}


def proven(**values: str) -> list[Any]:
    data = {"checks": [CHECK], "probes": [PEERS, ALONE], "fixes": [], "comparables": {**ALIKE, **values}}
    return [0, data, []]


def carried(*each: float) -> list[Any]:
    halves = dict(zip(("enp1s0f0np0", "enP2p1s0f0np0"), each, strict=True))
    measured = {"kind": "tcp", "halves": halves, "bus": 0.0, "size": 0, "network": "", "why": "", "lost": {}}
    return [0, {"measured": measured, "lost": {}}, []]


@pytest.fixture
def far(tmp_path: Path, checkout: tuple[Path, str]) -> FarNodes:
    nodes = FarNodes(tmp_path, *checkout)
    for host in ("spark-1", "spark-2"):
        nodes.add(host)
        measures(nodes, host)
    return nodes


def measures(nodes: FarNodes, host: str, ask: Any = None, **more: Any) -> None:
    answers = {
        "verify": proven(),
        "measurable": [0, {"why_not": ABLE}, []],
        "respond": [0, {"lost": {}}, []],
        "ask": ask or carried(47.0, 48.0),
        "says": {"respond": json.dumps({"answers-at": [29699, 29698]})},
    }
    nodes.answer(host, **{**answers, **more})


def test_differences_of_equal_nodes_are_one_line(far: FarNodes) -> None:
    code, lines = on_a_terminal(far, ["verify", "spark-1", "spark-2"], 100)
    assert code == 0, lines
    assert "✓ The nodes are equal in all 5 values that were compared." in lines


def test_differences_table_has_only_what_differs(far: FarNodes) -> None:
    measures(far, "spark-2", verify=proven(vllm="0.22.1", kernel="7.0.0-1019-nvidia"))
    code, lines = on_a_terminal(far, ["verify", "spark-1", "spark-2"], 100)
    rows = [" ".join(line.split()) for line in lines]
    assert code == 5
    assert "Differences 2 of 5 values that were compared" in rows
    assert "✗ vllm 0.18.1 0.22.1" in rows
    assert "! kernel 6.17.0-1029-nvidia 7.0.0-1019-nvidia" in rows
    assert not any("torch" in row for row in rows)
    code, reply, _ = far.cluster("verify", "spark-1", "spark-2")
    assert code == 5
    assert reply["data"]["differences"][0]["values"] == {"spark-1": "0.18.1", "spark-2": "0.22.1"}
    assert "the nodes differ in vllm" in reply["errors"][0]["message"]


def test_difference_that_is_a_warning_is_no_failure(far: FarNodes) -> None:
    measures(far, "spark-2", verify=proven(kernel="7.0.0"))
    code, reply, _ = far.cluster("verify", "spark-1", "spark-2")
    assert (code, [row["weight"] for row in reply["data"]["differences"]]) == (0, ["warn"])
    assert far.cluster("verify", "spark-1", "spark-2", "--level", "link")[1]["data"]["differences"] == []


def test_verify_without_measure_measures_nothing(far: FarNodes) -> None:
    far.cluster("verify", "spark-1", "spark-2", "--level", "link")
    assert {call["verb"] for call in far.calls} == {"identify", "verify"}
    assert all(call["argv"][-3:-1] == ["--level", "link"] for call in far.calls if call["verb"] == "verify")


def test_measure_runs_each_direction_one_after_the_other(far: FarNodes) -> None:
    measures(far, "spark-2", ask=carried(90.0, 0.1))
    code, reply, _ = far.cluster("verify", "spark-1", "spark-2", "--level", "link", "--measure")
    found = {(each["name"], each["from"], each["to"]): each for each in reply["data"]["bandwidth"]}
    assert found["tcp-bandwidth", "spark-1", "spark-2"]["verdict"] == "pass"
    assert found["tcp-bandwidth", "spark-2", "spark-1"]["found"].startswith("one half: 90.1 Gb/s")
    assert found["rdma-bandwidth", "spark-1", "spark-2"]["found"] == "spark-1: enp1s0f0np0 has no RDMA device"
    assert found["nccl-bandwidth", "spark-1", "spark-2"]["verdict"] == "skip"
    assert code == 5
    first, second = (call for call in far.calls if call["verb"] == "ask")
    assert first["argv"][:6] == ["node", "ask", "tcp", "192.168.100.11", "29699", "29698"]
    assert second["argv"][3] == "192.168.100.10"
    assert first["ended"] < second["began"]


def test_measure_silent_side_is_a_failed_measurement(far: FarNodes) -> None:
    bad = {"code": "failed", "message": "it did not start", "cause": "", "hint": "", "log": "", "output": []}
    measures(far, "spark-2", respond=[1, {}, [bad]], says={})
    _, reply, _ = far.cluster("verify", "spark-1", "spark-2", "--level", "link", "--measure")
    assert reply["data"]["bandwidth"][0]["verdict"] == "fail"
    assert reply["data"]["bandwidth"][0]["found"] == "spark-2: it did not start"


def test_strict_counts_skipped_probes_that_no_measurement_replaces(far: FarNodes) -> None:
    able = [0, {"why_not": dict.fromkeys(ABLE, "")}, []]
    for host in ("spark-1", "spark-2"):
        measures(far, host, measurable=able, ask=carried(95.0, 95.0))
    words = ("verify", "spark-1", "spark-2", "--level", "link", "--strict")
    only_tcp = ("--set", "network.transport=socket")
    assert "tcp-bandwidth" in str(far.cluster(*words)[1]["errors"])
    code, reply, _ = far.cluster(*words, "--measure", *only_tcp)
    assert [each["message"] for each in reply["errors"] if "--strict" in each["message"]] == []
    measures(far, "spark-1")
    code, reply, _ = far.cluster(*words, "--measure", *only_tcp)
    assert code == 5
    assert "spark-1: skipped, which --strict counts as failed: nccl-bandwidth to spark-2" in str(reply["errors"])


def test_junit_has_every_node_and_what_is_between_them(far: FarNodes, tmp_path: Path) -> None:
    measures(far, "spark-2", verify=proven(mtu="1500 + 1500"))
    path = tmp_path / "report.xml"
    far.cluster("verify", "spark-1", "spark-2", "--measure", "--junit", str(path))
    cases = {case.get("name"): {each.tag for each in case} for case in ElementTree.parse(path).iter("testcase")}
    assert cases["spark-1: network"] == set()
    assert cases["spark-2: peers"] == {"system-out"}
    assert cases["tcp-bandwidth spark-1 spark-2"] == {"system-out"}
    assert cases["nccl-bandwidth spark-1 spark-2"] == {"skipped"}
    assert cases["same mtu"] == {"failure"}


@pytest.mark.parametrize("words", [("--level", "link"), ("--measure",), ("--strict",), ("--junit", "x")])
def test_option_of_verify_is_refused_elsewhere(far: FarNodes, words: tuple[str, ...]) -> None:
    code, reply, _ = far.cluster("spark-1", "spark-2", *words)
    assert (code, words[0] in reply["errors"][0]["message"]) == (2, True)
    assert not far.calls


def test_measurement_is_shown_as_a_table(far: FarNodes) -> None:
    measures(far, "spark-2", ask=carried(90.0, 0.1))
    _, lines = on_a_terminal(far, ["verify", "spark-1", "spark-2", "--measure"], 120)
    rows = [" ".join(line.split()) for line in lines]
    assert "Bandwidth" in rows
    good = "✓ tcp-bandwidth spark-1 to spark-2 both halves: 95.0 Gb/s (47.0 enp1s0f0np0 + 48.0 enP2p1s0f0np0)"
    assert good in rows
    assert any(row.startswith("✗ tcp-bandwidth spark-2 to spark-1 one half: 90.1 Gb/s") for row in rows)
    assert any(row.startswith("· nccl-bandwidth spark-1 and spark-2") for row in rows)
    assert "✓ spark-1 1 of 1 probes passed" in rows
    assert max(map(len, lines)) <= 120
