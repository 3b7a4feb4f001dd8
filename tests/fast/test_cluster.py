"""`cluster`: members, the order of phases, what goes over ssh, and errors when a node fails."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sparkinstall.cluster import bootstrap, drift
from sparkinstall.cluster.orchestrate import PHASES, members
from sparkinstall.cluster.ssh import explained
from sparkinstall.cluster.uploads import uploads
from sparkinstall.config import ClusterConfig, Config, NetworkConfig
from sparkinstall.core import catalogue
from sparkinstall.errors import BadConfig, BadUsage, Blocked, NeedsRoot
from sparkinstall.facts.machine import identity
from sparkinstall.system.local import LocalReader
from tests.support.far_nodes import STEPS, VERSIONS, FarNodes, look, problem, step
from tests.support.machine import Machine
from tests.support.tiny_stack import tiny_stack
from tests.support.waiting import until


@pytest.fixture
def far(tmp_path: Path, checkout: tuple[Path, str]) -> FarNodes:
    nodes = FarNodes(tmp_path, *checkout)
    nodes.add("spark-1")
    nodes.add("spark-2")
    return nodes


def _verbs(far: FarNodes) -> list[tuple[str, str, str]]:
    return [(call["host"], call["verb"], "+".join(call["only"])) for call in far.calls]


# --- members


def test_members_first_host_is_head_and_workers_follow_in_address_order() -> None:
    found = members(["a", "b", "me@c", "d"], Config())
    assert [(m.host, m.role, m.rank, m.address) for m in found] == [
        ("a", "head", 0, "192.168.100.10"),
        ("b", "worker", 1, "192.168.100.11"),
        ("me@c", "worker", 2, "192.168.100.12"),
        ("d", "worker", 3, "192.168.100.13"),
    ]
    assert members(["a"], Config())[0].role == "single"


@pytest.mark.parametrize("hosts", [["a", "b", "a"], ["-oProxyCommand=x", "b"], ["a b", "c"], ["a", ""], ["a\n", "b"]])
def test_members_impossible_host_is_refused(hosts: list[str]) -> None:
    with pytest.raises(BadUsage):
        members(hosts, Config())


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (Config(network=NetworkConfig(twin_subnet="192.168.100.0")), "both halves of the port would be in one subnet"),
        (Config(cluster=ClusterConfig(head="10.77.0.1")), "192.168.100.11 is not in the head's subnet"),
        (Config(cluster=ClusterConfig(workers=("192.168.100.10",))), "two nodes have the address 192.168.100.10"),
    ],
)
def test_members_unusable_addresses_are_refused_before_any_request(config: Config, sentence: str) -> None:
    with pytest.raises(BadConfig, match=sentence):
        members(["a", "b"], config)


def test_members_more_than_the_subnet_holds_are_refused() -> None:
    with pytest.raises(BadUsage, match="no more addresses"):
        members([f"n{n}" for n in range(300)], Config())


def test_phases_contain_every_step_of_a_node_once() -> None:
    for whom in ("head", "workers"):
        steps = [name for phase in PHASES if phase.whom in ("all", whom) for name in phase.steps]
        assert len(steps) == len(set(steps))
        assert {each.name for each in catalogue.STEPS} <= set(steps)


# --- phases and barriers


def test_phases_run_in_order_with_a_barrier_after_each(far: FarNodes) -> None:
    far.answer("spark-2", slow=0.3)
    code, reply, log = far.cluster("spark-1", "spark-2", "--yes")
    assert code == 0, reply["errors"]
    after = 0.0
    for phase in (
        {("spark-1", "look", ""), ("spark-2", "look", "")},
        {("spark-1", "multi-node", "packages"), ("spark-2", "multi-node", "packages")},
        {("spark-1", "multi-node", "network+firewall"), ("spark-2", "multi-node", "network+firewall")},
        {("spark-1", "reach", ""), ("spark-2", "reach", "")},
        {("spark-1", "confirm", ""), ("spark-2", "confirm", "")},
        {("spark-1", "multi-node", "environment+nccl+fp8")},
        {("spark-1", "offer", "environment+nccl")},
        {("spark-2", "multi-node", "environment+nccl+fp8")},
    ):
        calls = [c for c in far.calls if (c["host"], c["verb"], "+".join(c["only"])) in phase and c["began"] > after]
        calls = calls[: len(phase)]
        assert {(c["host"], c["verb"], "+".join(c["only"])) for c in calls} == phase
        assert min(c["began"] for c in calls) > after
        after = max(c["ended"] for c in calls)
    services = "env-files+ray+serving"
    assert _verbs(far)[-5:-2] == [
        ("spark-1", "multi-node", services),
        ("spark-1", "token", ""),
        ("spark-2", "multi-node", services),
    ]
    assert set(_verbs(far)[-2:]) == {("spark-1", "verify", ""), ("spark-2", "verify", "")}
    assert "spark-2 │ network: done" in log
    assert [node["role"] for node in reply["data"]["nodes"]] == ["head", "worker"]


def test_request_goes_through_stdin(far: FarNodes) -> None:
    code, _, log = far.cluster("spark-1", "spark-2", "--yes", "--set", 'serving.arguments=[--max-model-len, "4096"]')
    assert code == 0
    assert all(call["process"] == ["node", "attend"] for call in far.calls)
    worker = [call for call in far.calls if call["host"] == "spark-2" and "ray" in call["only"]]
    assert [call["stdin"] for call in worker] == ["t0ken-of-the-head"]
    assert worker[0]["argv"][:3] == ["multi-node", "--role", "worker"]
    assert "--token-file" in worker[0]["argv"]
    assert 'cluster.workers=["192.168.100.11"]' in worker[0]["argv"]
    assert "cluster.address=192.168.100.11" in worker[0]["argv"]
    assert 'serving.arguments=["--max-model-len", "4096"]' in worker[0]["argv"]
    assert "t0ken" not in log


def _carried(far: FarNodes, host: str, setting: str) -> Path:
    """The file on the node that this setting names in every request."""
    words: set[str] = {
        word for call in far.calls if call["host"] == host for word in call["argv"] if word.startswith(setting)
    }
    (only,) = words
    place = only.partition("=")[2]
    assert place.startswith("~/")
    return far.lab / host / place.removeprefix("~/")


def test_upload_custom_stack_goes_to_every_node_once(far: FarNodes) -> None:
    mine = tiny_stack(far.lab / "mine")
    for host in ("spark-1", "spark-2"):
        far.answer(host, look=look("unchanged"))
    for trips in (4, 2):
        code, reply, _ = far.cluster("spark-1", "spark-2", "--stack", "mine/tiny.yaml")
        assert code == 0, reply["errors"]
        assert [node["ssh_trips"] for node in reply["data"]["nodes"]] == [trips, trips]
    for host in ("spark-1", "spark-2"):
        there = _carried(far, host, "stack=")
        assert there.read_bytes() == mine.read_bytes()
        assert there.with_name("tiny.lock").read_bytes() == mine.with_name("tiny.lock").read_bytes()


def test_upload_changed_stack_keeps_the_place_of_the_tarball(far: FarNodes) -> None:
    """The path is part of NCCL's recipe: another path would be another build."""
    mine = tiny_stack(far.lab / "mine")
    (far.lab / "nccl.tar.gz").write_bytes(b"its content")
    words = ("plan", "spark-1", "--stack", "mine/tiny.yaml", "--set", "nccl.source=./nccl.tar.gz")
    places = []
    for _ in range(2):
        assert far.cluster(*words)[0] == 0
        places.append((_carried(far, "spark-1", "nccl.source="), _carried(far, "spark-1", "stack=")))
        (far.lab / "calls").unlink()
        mine.write_text(mine.read_text() + "# changed\n")
    assert places[0][0] == places[1][0] and places[0][1] != places[1][1]


def test_upload_from_two_terminals_at_once_works(far: FarNodes) -> None:
    tiny_stack(far.lab / "mine")
    for host in ("spark-1", "spark-2"):
        far.answer(host, look=look("unchanged"))
    with ThreadPoolExecutor(4) as pool:
        ends = list(pool.map(lambda _: far.cluster("plan", "spark-1", "--stack", "mine/tiny.yaml")[0], range(4)))
    assert ends == [0] * 4
    (one,) = _carried(far, "spark-1", "stack=").parents[1].iterdir()
    assert sorted(each.name for each in one.iterdir()) == [".whole", "tiny.lock", "tiny.yaml"]


def test_upload_cut_in_transfer_is_sent_again(far: FarNodes) -> None:
    mine = tiny_stack(far.lab / "mine")
    (what,) = uploads({"stack": str(mine)})[1]
    cut = bootstrap.packed(what.files)[:1536]
    home = {"HOME": str(far.lab / "spark-1"), "PATH": os.environ["PATH"]}
    unpack = ["sh", "-c", bootstrap.UNPACK, "sparkinstall", what.digest]
    assert subprocess.run(unpack, input=cut, env=home, check=False, capture_output=True).returncode == 1
    assert not list((far.lab / "spark-1" / bootstrap.UPLOADS).iterdir())
    assert far.cluster("plan", "spark-1", "--stack", str(mine))[0] == 0
    assert _carried(far, "spark-1", "stack=").exists()


def test_uninstall_needs_no_stack(far: FarNodes) -> None:
    (far.lab / "config.yaml").write_text("stack: ./mine/tiny.yaml\n")
    mine = tiny_stack(far.lab / "mine")
    mine.with_name("tiny.lock").unlink()
    for verb in ("status", "uninstall"):
        assert far.cluster(verb, "spark-1", "--config", "config.yaml", "--yes")[0] == 0
    assert far.cluster("plan", "spark-1", "--config", "config.yaml")[0] == 2


def test_upload_changed_stack_is_sent_again(far: FarNodes) -> None:
    mine = tiny_stack(far.lab / "mine")
    assert far.cluster("plan", "spark-1", "--stack", "mine/tiny.yaml")[0] == 0
    mine.write_text(mine.read_text() + "# changed\n")
    (far.lab / "calls").unlink()
    assert far.cluster("plan", "spark-1", "--stack", "mine/tiny.yaml")[0] == 0
    assert _carried(far, "spark-1", "stack=").read_text().endswith("# changed\n")


def test_upload_tarball_is_sent_only_if_it_exists_here(far: FarNodes) -> None:
    (far.lab / "nccl.tar.gz").write_bytes(b"its content")
    assert far.cluster("plan", "spark-1", "--set", "nccl.source=./nccl.tar.gz")[0] == 0
    assert _carried(far, "spark-1", "nccl.source=").read_bytes() == b"its content"
    (far.lab / "calls").unlink()
    assert far.cluster("plan", "spark-1", "--set", "nccl.source=/on/the/nodes/nccl.tar.gz")[0] == 0
    assert "nccl.source=/on/the/nodes/nccl.tar.gz" in far.calls[0]["argv"]


@pytest.mark.parametrize(
    ("was", "now", "sentence"),
    [
        ("lock: tiny.lock", "lock: ../tiny.lock", "put it beside the stack's YAML file"),
        ("lock: tiny.lock", "lock: {mine}/tiny.lock", "put it beside the stack's YAML file"),
        ("lock: tiny.lock", "lock: gone.lock", "gone.lock cannot be copied to the nodes: No such file or directory"),
        ("name: tiny", "name: [tiny]", "`name` must be letters"),
    ],
)
def test_upload_unusable_stack_is_refused_before_any_request(far: FarNodes, was: str, now: str, sentence: str) -> None:
    mine = tiny_stack(far.lab / "mine")
    mine.write_text(mine.read_text().replace(was, now.format(mine=mine.parent)))
    code, reply, _ = far.cluster("spark-1", "spark-2", "--stack", str(mine))
    assert code == 2
    (error,) = reply["errors"]
    assert error["code"] == "config" and sentence in f"{error['message']} {error['hint']}"
    assert not far.calls


def test_upload_that_cannot_be_written_names_the_node(far: FarNodes) -> None:
    tiny_stack(far.lab / "mine")
    (far.lab / "spark-2/.local/share/sparkinstall/uploads").write_text("in the way")
    code, reply, _ = far.cluster("plan", "spark-1", "spark-2", "--stack", "mine/tiny.yaml")
    assert code == 5
    (error,) = reply["errors"]
    assert error["message"] == "files that the settings name could not be copied to spark-2"
    assert "uploads" in error["cause"]


def test_network_is_confirmed_only_over_a_new_connection(far: FarNodes) -> None:
    far.cluster("spark-1", "spark-2", "--yes")
    assert sorted(trip for trip in far.trips if trip.endswith("new")) == ["spark-1 new", "spark-2 new"]
    network = [call for call in far.calls if "network" in call["only"]]
    assert all("--leave-armed" in call["argv"] for call in network)
    (reach,) = [call for call in far.calls if call["verb"] == "reach" and call["host"] == "spark-1"]
    assert reach["argv"][2] == "192.168.100.11"


def test_network_unreachable_is_not_confirmed(far: FarNodes) -> None:
    far.answer("spark-2", reach=[1, {}, [problem("192.168.100.10 does not answer over the link")]])
    code, reply, _ = far.cluster("spark-1", "spark-2", "--yes")
    assert code == 5
    assert not [call for call in far.calls if call["verb"] == "confirm"]
    assert reply["errors"][0]["message"] == "spark-2: 192.168.100.10 does not answer over the link"


def test_converged_cluster_gets_two_requests_and_no_change(far: FarNodes) -> None:
    for host in ("spark-1", "spark-2"):
        far.answer(host, look=look("unchanged"))
    code, reply, _ = far.cluster("spark-1", "spark-2")
    assert code == 0
    assert {call["verb"] for call in far.calls} == {"look", "verify"}
    assert [node["ssh_trips"] for node in reply["data"]["nodes"]] == [2, 2]


def test_network_unconfirmed_by_a_killed_run_is_confirmed(far: FarNodes) -> None:
    far.answer("spark-1", look=look("unchanged"))
    far.answer("spark-2", look=look("unchanged", armed=True), multi_node=[0, {"changed": False}, []])
    code, _, _ = far.cluster("spark-1", "spark-2", "--yes")
    assert code == 0
    assert ("spark-2", "confirm", "") in _verbs(far)


def test_worker_with_another_token_gets_the_heads(far: FarNodes) -> None:
    far.answer("spark-1", look=look("unchanged"))
    far.answer("spark-2", look=look("unchanged", token="other"))
    assert far.cluster("spark-1", "spark-2", "--yes")[0] == 0
    assert ("spark-2", "multi-node", "env-files+ray+serving") in _verbs(far)
    assert ("spark-1", "multi-node", "env-files+ray+serving") not in _verbs(far)


def test_failed_node_stops_all_at_the_next_barrier_and_hides_nothing(far: FarNodes) -> None:
    far.answer("spark-1", multi_node__packages=[1, {}, [problem("apt could not install git")]])
    code, reply, log = far.cluster("spark-1", "spark-2", "--yes")
    assert code == 5
    assert reply["status"] == "some-nodes"
    assert ("spark-2", "multi-node", "packages") in _verbs(far)
    assert not [call for call in far.calls if "network" in call["only"]]
    first, second = reply["data"]["nodes"]
    assert [p["outcome"] for p in first["phases"]] == ["unchanged", "failed"]
    assert [p["outcome"] for p in second["phases"]] == ["unchanged", "changed"]
    assert reply["errors"] == [{**problem("spark-1: apt could not install git"), "log": "spark-1:/l"}]
    assert "spark-1 │ packages: failed: apt could not install git" in log


def test_failed_check_on_one_node_stops_all(far: FarNodes) -> None:
    sudo = {
        "name": "sudo",
        "verdict": "fail",
        "found": "sudo asks for a password",
        "hint": "x",
        "title": "",
        "seconds": 0,
    }
    far.answer("spark-2", look=look(preflight=[sudo]))
    code, reply, _ = far.cluster("spark-1", "spark-2", "--yes")
    assert code == 5
    assert {call["verb"] for call in far.calls} == {"look"}
    assert reply["errors"][0]["code"] == "preflight"
    assert "NOPASSWD" in reply["errors"][0]["hint"]
    assert far.cluster("spark-1", "spark-2", "--yes", "--ignore", "sudo")[0] == 0


def test_missing_sudo_password_is_reported_once(far: FarNodes) -> None:
    """Without it the firewall cannot be read either: the same cause is not reported twice."""
    sudo = {"name": "sudo", "verdict": "fail", "found": "sudo asks", "hint": "x", "title": "", "seconds": 0}
    unseen = {**step("firewall", "failed"), "error": {**problem("cannot be read"), "code": NeedsRoot.code}}
    far.answer("spark-2", look=look(preflight=[sudo], steps=[step("packages"), unseen]))
    code, reply, _ = far.cluster("spark-1", "spark-2", "--yes")
    assert code == 5
    assert [each["code"] for each in reply["errors"]] == ["preflight"]


def test_conflict_is_reported_before_anything_is_applied(far: FarNodes) -> None:
    taken = step("network")
    taken["resources"] = [
        {"key": "n", "state": "conflict", "changed": False, "message": "eth0 is the LAN", "hint": "name it"}
    ]
    far.answer("spark-2", look=look(steps=[step("packages"), taken]))
    code, reply, _ = far.cluster("spark-1", "spark-2", "--yes")
    assert code == 5
    assert reply["errors"][0]["message"] == "spark-2: network: eth0 is the LAN"
    assert {call["verb"] for call in far.calls} == {"look"}


# --- identity


@pytest.mark.parametrize("verb", [(), ("plan",)])
@pytest.mark.parametrize("hosts", [("spark-1", "me@spark-1"), ("spark-1", "spark-2", "me@spark-1", "spark-1.lan")])
def test_machine_under_two_names_is_refused_before_it_is_touched(
    far: FarNodes, hosts: tuple[str, ...], verb: tuple[str, ...]
) -> None:
    for host in hosts:
        if host not in ("spark-1", "spark-2"):
            far.add(host)
        far.answer(host, look=look(machine=f"m{'spark-1' in host}", addresses=["10.0.0.5"]))
    code, reply, _ = far.cluster(*verb, *hosts, "--yes")
    assert (code, {call["verb"] for call in far.calls}) == (5, {"look"})
    assert [each["message"] for each in reply["errors"]] == [
        f"{host} is the same machine as spark-1" for host in hosts if "spark-1" in host and host != "spark-1"
    ]
    assert all("name every node once" in each["hint"] for each in reply["errors"])


def _identities(far: FarNodes, **machines: tuple[str, str]) -> None:
    for host, (machine, address) in machines.items():
        name = host.replace("_", "-")
        if not (far.lab / name).exists():
            far.add(name)
        far.answer(name, identify=[0, {"machine": machine, "addresses": ["10.0.0.5", address]}, []])


LATER_VERBS = ("verify", "status", "uninstall")


@pytest.mark.parametrize("verb", LATER_VERBS)
def test_machine_under_two_names_is_refused_by_every_verb(far: FarNodes, verb: str) -> None:
    _identities(far, spark_1=("m", "10.0.0.6"), spark_2=("n", "10.0.0.7"), again=("m", "10.0.0.6"))
    code, reply, _ = far.cluster(verb, "spark-1", "spark-2", "again", "--yes")
    assert (code, {call["verb"] for call in far.calls}) == (5, {"identify"})
    (error,) = reply["errors"]
    assert error["message"] == "again is the same machine as spark-1"
    assert "name every node once" in error["hint"]


@pytest.mark.parametrize("verb", LATER_VERBS)
def test_nodes_in_another_order_are_refused_by_every_verb(far: FarNodes, verb: str) -> None:
    _identities(far, spark_1=("m", "192.168.100.10"), spark_2=("n", "192.168.100.11"))
    code, reply, _ = far.cluster(verb, "spark-2", "spark-1", "--yes")
    assert (code, {call["verb"] for call in far.calls}) == (5, {"identify"})
    assert len(reply["errors"]) == 2
    for each in reply["errors"]:
        assert each["cause"] == "the nodes were set up in another order"
        assert f"`sparkinstall cluster {verb} spark-1 spark-2`" in each["hint"]


@pytest.mark.parametrize("verb", LATER_VERBS)
def test_part_of_a_cluster_and_nodes_of_unknown_identity_are_taken_by_every_verb(far: FarNodes, verb: str) -> None:
    """The workers alone, and one with an older version, which does not know the question."""
    _identities(far, spark_1=("m", "192.168.100.11"), spark_2=("n", "192.168.100.12"))
    far.add("older", identify=[2, {}, [problem("No such command 'identify'.")]])
    code, reply, _ = far.cluster(verb, "spark-1", "spark-2", "older", "--yes")
    assert (code, reply["errors"]) == (0, [])
    assert [call["verb"] for call in far.calls].count(verb) == 3


def test_report_names_a_machine_under_two_names(far: FarNodes) -> None:
    _identities(far, spark_1=("m", "10.0.0.6"), spark_2=("m", "10.0.0.6"))
    assert far.cluster("verify", "spark-1", "spark-2", "--junit", "report.xml")[0] == 5
    assert "spark-2 is the same machine as spark-1" in (far.lab / "report.xml").read_text()


def test_node_without_an_answer_is_reported_once(far: FarNodes) -> None:
    (far.lab / "spark-1/ssh-says").write_text("ssh: connect to host spark-1 port 22: No route to host\n")
    code, reply, _ = far.cluster("status", "spark-1", "spark-2")
    assert (code, [each["message"] for each in reply["errors"]]) == (5, ["spark-1 does not answer"])
    assert ("spark-2", "status", "") in _verbs(far)


@pytest.mark.parametrize("machines", [("", ""), ("a", "b"), ("", "a")])
def test_machines_that_are_not_known_to_be_the_same_are_set_up(far: FarNodes, machines: tuple[str, str]) -> None:
    for host, machine in zip(("spark-1", "spark-2"), machines, strict=True):
        far.answer(host, look=look(machine=machine, addresses=["10.0.0.5"]))
    assert far.cluster("spark-1", "spark-2", "--yes")[0] == 0


@pytest.mark.parametrize("verb", [(), ("plan",)])
@pytest.mark.parametrize("order", ["ba", "acb", "cab", "bca"])
def test_nodes_in_another_order_than_they_were_set_up_in_are_refused(
    far: FarNodes, order: str, verb: tuple[str, ...]
) -> None:
    taken = step("network")
    taken["resources"] = [{"key": "n", "state": "conflict", "changed": False, "message": "in use", "hint": "choose"}]
    former = sorted(order)
    for at, host in enumerate(former):
        far.add(host)
        addresses = ["10.0.0.7", f"192.168.100.{10 + at}"]
        steps = [step("packages"), taken if order.index(host) != at else step("network")]
        far.answer(host, look=look(machine=host, addresses=addresses, steps=steps))
    code, reply, _ = far.cluster(*verb, *order, "--yes")
    assert (code, {call["verb"] for call in far.calls}) == (5, {"look"})
    assert len(reply["errors"]) == sum(one != other for one, other in zip(order, former, strict=True))
    for each in reply["errors"]:
        assert each["cause"] == "the nodes were set up in another order"
        assert f"`sparkinstall cluster {' '.join(former)}`" in each["hint"]
        assert f"`sparkinstall cluster uninstall {' '.join(former)}`" in each["hint"]


def test_address_of_a_node_that_gets_another_is_named(far: FarNodes) -> None:
    """A worker becomes the second one, and the new first one is to have its address."""
    far.add("spark-3")
    for host, address in (("spark-1", "192.168.100.10"), ("spark-2", "192.168.100.11"), ("spark-3", "10.0.0.8")):
        far.answer(host, look=look(machine=host, addresses=[address]))
    code, reply, _ = far.cluster("plan", "spark-1", "spark-3", "spark-2")
    (error,) = reply["errors"]
    assert (code, error["cause"]) == (5, "")
    assert error["message"] == "spark-3 is to be the worker with 192.168.100.11, but spark-2 has it"
    assert "`sparkinstall cluster uninstall spark-2`" in error["hint"]


def test_identity_tells_machines_of_one_image_and_boots_of_one_kernel_apart(tmp_path: Path) -> None:
    found = set()
    for machine, boot in (("a", "x"), ("a", "y"), ("b", "x"), ("", "x"), ("uninitialized", "y")):
        for path, text in (("etc/machine-id", machine), ("proc/sys/kernel/random/boot_id", boot)):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(f"{text}\n")
        found.add(identity(Machine(str(tmp_path))))
        assert identity(Machine(str(tmp_path))) in found
    assert len(found) == 4
    assert "" in found


@pytest.mark.parametrize("verb", ["look", "identify"])
def test_node_tells_its_identity_and_addresses(checkout: tuple[Path, str], verb: str) -> None:
    request = {"argv": ["node", verb, "--json"]}
    whole = [sys.executable, "-m", "sparkinstall", "node", "attend"]
    with subprocess.Popen(whole, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=checkout[0]) as run:
        assert run.stdin is not None
        assert run.stdout is not None
        run.stdin.write(json.dumps(request).encode() + b"\n")
        run.stdin.flush()
        data = json.loads(run.stdout.read())["data"]
    assert data["machine"] == identity(LocalReader())
    assert "127.0.0.1" in data["addresses"]


# --- failures of nodes


def test_unreachable_node_is_named_and_the_others_are_asked(far: FarNodes) -> None:
    (far.lab / "spark-1/ssh-says").write_text("ssh: connect to host spark-1 port 22: No route to host\n")
    code, reply, _ = far.cluster("spark-1", "spark-2", "--yes")
    assert code == 5
    assert reply["errors"][0]["code"] == "unreachable"
    assert reply["errors"][0]["message"] == "spark-1 does not answer"
    assert _verbs(far) == [("spark-2", "look", "")]


def test_different_versions_stop_before_the_head_starts(far: FarNodes) -> None:
    far.answer("spark-2", look=look(versions={**VERSIONS, "vllm": "0.22.1"}))
    code, reply, _ = far.cluster("spark-1", "spark-2", "--yes")
    assert code == 5
    assert "spark-1 and spark-2" in reply["errors"][0]["message"]
    assert "0.18.1 on spark-1, 0.22.1 on spark-2" in reply["errors"][0]["cause"]
    assert not [call for call in far.calls if "ray" in call["only"]]


def test_require_same_equal_versions_pass() -> None:
    drift.require_same({"a": VERSIONS, "b": dict(VERSIONS)})
    with pytest.raises(Blocked, match="NCCL"):
        drift.require_same({"a": VERSIONS, "b": {k: v for k, v in VERSIONS.items() if k != "nccl"}})


def test_require_same_sockets_and_roce_are_refused() -> None:
    roce, sockets = {**VERSIONS, "transport": "roce"}, {**VERSIONS, "transport": "socket"}
    drift.require_same({"a": roce, "b": roce})
    with pytest.raises(Blocked, match="transport for NCCL") as refused:
        drift.require_same({"a": roce, "b": sockets})
    assert "network.transport=socket" in refused.value.hint


def test_cluster_without_yes_asks_before_it_applies(far: FarNodes) -> None:
    code, reply, _ = far.cluster("spark-1", "spark-2")
    assert code == 2
    assert "--yes" in reply["errors"][0]["hint"]
    assert {call["verb"] for call in far.calls} == {"look"}


@pytest.mark.parametrize("words", [("plan",), (), ("spark-1", "spark-1"), ("spark-1", "--only", "netwrok")])
def test_cluster_invalid_words_are_a_usage_error(far: FarNodes, words: tuple[str, ...]) -> None:
    assert far.cluster(*words)[0] == 2
    assert not far.calls


# --- the other verbs


def test_plan_changes_nothing(far: FarNodes) -> None:
    code, reply, _ = far.cluster("plan", "spark-1", "spark-2")
    assert code == 0
    assert {call["verb"] for call in far.calls} == {"look"}
    assert [each["step"] for each in reply["data"]["nodes"][1]["steps"]] == list(STEPS)


def test_uninstall_starts_with_the_workers_and_installs_nothing(far: FarNodes) -> None:
    far.add("bare")
    (far.lab / "bare/.local/share/sparkinstall/tool/made-from").unlink()
    uninstalled: list[Any] = [0, {"changes": []}, []]
    for host in ("spark-1", "spark-2"):
        far.answer(host, uninstall=uninstalled)
    assert far.cluster("uninstall", "spark-1", "spark-2", "bare")[0] == 2
    code, reply, _ = far.cluster("uninstall", "spark-1", "spark-2", "bare", "--yes")
    assert [call["host"] for call in far.calls if call["verb"] == "uninstall"] == ["spark-2", "spark-1"]
    assert code == 0, reply["errors"]


# --- ssh


@pytest.mark.parametrize(
    ("stderr", "words"),
    [
        ("ssh: Could not resolve hostname nix: Name or service not known", "could not be resolved"),
        ("ssh: connect to host a port 22: Connection timed out", "does not answer"),
        ("ssh: connect to host a port 22: Connection refused", "refuses ssh connections"),
        ("spark@a: Permission denied (publickey).", "refuses your login"),
        ("No ED25519 host key is known for a and you have requested strict checking.\nHost key verification failed.",
         "unknown here"),
        ("Timeout, server a not responding.", "was lost"),
        ("Connection to a closed by remote host.", "was lost"),
        ("client_loop: send disconnect: Broken pipe", "was lost"),
        ("Permission denied: that is the far program\na\nb\nc\nConnection to a closed by remote host.", "was lost"),
    ],
)  # fmt: skip
def test_ssh_failure_becomes_an_error_with_a_hint(stderr: str, words: str) -> None:
    error = explained("me@a", stderr)
    assert words in error.message
    assert error.hint


def test_ssh_changed_host_key_is_explained_and_checking_stays_on() -> None:
    stderr = (
        "@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @\n"
        "Offending ED25519 key in /home/me/.ssh/known_hosts:7\nHost key verification failed."
    )
    error = explained("me@spark-1", stderr)
    assert "known_hosts:7" in error.cause
    assert "ssh-keygen -R spark-1" in error.hint
    assert "StrictHostKeyChecking" not in error.hint


# --- installation on a node


def test_digest_equals_that_of_install_sh(checkout: tuple[Path, str]) -> None:
    folder, digest = checkout
    script = (folder / "install.sh").read_text().replace('main "$@"', f"HERE={folder}; digest_of_checkout")
    done = subprocess.run(["sh"], input=script, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest


@pytest.mark.network
@pytest.mark.parametrize("home", ['My Spark it\'s $HOME "x" `id` back\\slash -e ', "Übung;[x]&(e)#%20@~1"])
def test_bare_node_with_an_odd_home_gets_sparkinstall_first(
    home: str, tmp_path: Path, checkout: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    (tmp_path / home / "fresh").mkdir(parents=True)
    far = FarNodes(tmp_path / home, *checkout)
    cache = tmp_path_factory.getbasetemp() / "cache"
    code, reply, log = far.cluster("plan", "fresh", XDG_CACHE_HOME=str(cache))
    assert code == 0, reply["errors"]
    (node,) = reply["data"]["nodes"]
    assert (node["tool_brought"], node["ssh_trips"]) == (True, 3)
    assert {"packages", "environment"} <= {each["step"] for each in node["steps"]}
    assert "installing sparkinstall" in log
    code, reply, _ = far.cluster("plan", "fresh", XDG_CACHE_HOME=str(cache))
    assert reply["data"]["nodes"][0]["ssh_trips"] == 1
    assert [*cache.glob("sparkinstall/own-packages/*/*.whl")]
    shutil.rmtree(tmp_path)


def test_failed_installation_on_a_node_leaves_nothing_there(far: FarNodes, tmp_path: Path) -> None:
    (far.lab / "fresh").mkdir()
    # A folder without wheels: pip fails, whatever the network does.
    lock = (far.checkout / "requirements.lock").read_bytes()
    key = f"{hashlib.sha256(lock).hexdigest()[:16]}-{sys.version_info[0]}.{sys.version_info[1]}-{platform.machine()}"
    (wheels := tmp_path / "cache/sparkinstall/own-packages" / key).mkdir(parents=True)
    (wheels / "none").touch()
    code, reply, _ = far.cluster("plan", "fresh", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert code == 5
    assert "network" not in reply["errors"][0]["hint"]
    assert not (far.lab / "fresh/.local/share/sparkinstall").exists()


_SHOW_STDIN = """\
import sys
from sparkinstall.cluster import agent
agent.serve(lambda argv: print(argv, sys.stdin.readline(), sys.stdin.buffer.read(), sys.stdin.isatty()))
"""


def test_agent_gives_a_verb_its_own_stdin_and_no_more(checkout: tuple[Path, str]) -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", _SHOW_STDIN], stdin=pipe, stdout=pipe, cwd=checkout[0]) as run:
        assert run.stdin is not None and run.stdout is not None
        run.stdin.write(json.dumps({"argv": ["all", "--json"], "stdin": "the token"}).encode() + b"\n")
        run.stdin.flush()
        assert run.stdout.read().split(b"\n") == [b"('all', '--json') the token b'' False", b""]
        assert run.wait(timeout=300) == 0


def test_agent_takes_the_heads_token_for_a_worker(checkout: tuple[Path, str], tmp_path: Path) -> None:
    argv = ["multi-node", "--role", "worker", "--root", str(tmp_path / "node"), "--token-file", "-"]
    request = {"argv": [*argv, "--only", "ray", "--yes", "--json"], "stdin": "t0ken-of-the-head\n"}
    pipe = subprocess.PIPE
    whole = [sys.executable, "-m", "sparkinstall", "node", "attend"]
    with subprocess.Popen(whole, stdin=pipe, stdout=pipe, stderr=pipe, cwd=checkout[0]) as run:
        assert run.stdin is not None and run.stdout is not None and run.stderr is not None
        run.stdin.write(json.dumps(request).encode() + b"\n")
        run.stdin.flush()
        reply = json.loads(run.stdout.read())
    (token,) = (tmp_path / "node").rglob("ray-token")
    assert token.read_text().strip() == "t0ken-of-the-head", reply["errors"]


def test_agent_ends_itself_when_the_terminal_is_gone(checkout: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / "ping").write_text(f"#!/bin/sh\ntouch {tmp_path}/pinged; exec sleep 600\n")
    (tmp_path / "ping").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    argv = [sys.executable, "-m", "sparkinstall", "node", "attend"]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, cwd=checkout[0], env=env) as run:
        assert run.stdin is not None
        request = {"argv": ["node", "reach", "192.0.2.254", "192.0.2.253", "--json"], "stdin": ""}
        run.stdin.write(json.dumps(request).encode() + b"\n")
        run.stdin.flush()
        until((tmp_path / "pinged").exists, during=run)
        run.stdin.close()
        assert run.wait(timeout=300) == 130, "not that of a node that does not answer"
