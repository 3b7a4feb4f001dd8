"""Ray as units of systemd on two nodes with a cable: they start, restart, refuse a wrong token, and are removed.

All tests use the same nodes, in order.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import pytest

from sparkinstall import ray_ports
from sparkinstall.resources import systemd
from tests.lab.cabling import PORT_0, Cabling, ip
from tests.lab.node import Bind, FreshNode
from tests.nodes.fresh import compiled_checkout
from tests.support import ray_environment
from tests.support.ray_on_a_node import ADDRESSES
from tests.support.waiting import until

pytestmark = [pytest.mark.layer2, pytest.mark.layer3, pytest.mark.network]

CHECKOUT = "/srv/checkout"
PREFIX = "/opt/sparkinstall"
TOKEN = f"{PREFIX}/ray-token"
NAMES = {"head": "multi-node-head", "worker": "multi-node-worker"}
ENV = """\
# Like that of the step `env-files`, without NCCL and CUDA.
set -a
VLLM_HOST_IP="{address}"
RAY_ADDRESS="{head}:6379"
RAY_AUTH_MODE="token"
RAY_AUTH_TOKEN_PATH="{token}"
RAY_memory_usage_threshold="1.0"
RAY_memory_monitor_refresh_ms="0"
VIRTUAL_ENV="{prefix}/venv"
{more}
set +a
: <<'SYSTEMD'
PATH="{prefix}/venv/bin:/usr/local/bin:/usr/bin:/bin"
SYSTEMD
. "{prefix}/venv/bin/activate"
"""
SPREAD = """
import json, ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as In
ray.init(logging_level="ERROR")
group = placement_group([{"GPU": 1}, {"GPU": 1}], strategy="STRICT_SPREAD")
ray.get(group.ready(), timeout=600)
where = ray.remote(num_cpus=0, num_gpus=1)(lambda: ray.util.get_node_ip_address())
found = ray.get([where.options(scheduling_strategy=In(group, i)).remote() for i in (0, 1)])
ray.shutdown()  # until then a driver also prints events of other nodes
print(json.dumps(sorted(found)))
"""


LOOK = """
import json, sys
from sparkinstall.probes import services
from sparkinstall.system.local import LocalReader
from tests.support.ray_on_a_node import declared_node
(probe,) = [each for each in services.probes(declared_node(sys.argv[1], {})) if each.name == "running-env"]
found = probe.look(LocalReader())
print(json.dumps([found.verdict, found.found]))
"""


class Pair(NamedTuple):
    head: FreshNode
    worker: FreshNode


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    checkout = compiled_checkout(tmp_path_factory.mktemp("ray"), CHECKOUT)
    with ExitStack() as stack:
        wires = Cabling(direct=True)
        stack.callback(wires.remove)
        nodes = [stack.enter_context(_node(wires, role, checkout)) for role in ADDRESSES]
        for node, role in zip(nodes, ADDRESSES, strict=True):
            node.run("install", "-d", "-o", "spark", "-g", "spark", PREFIX)
            write_env(node, role)
        yield Pair(*nodes)


def _node(wires: Cabling, role: str, checkout: Bind) -> FreshNode:
    plugs = wires.add(role, PORT_0[:1])
    wires.power_on(plugs)
    ip(plugs.netns, "addr", "add", f"{ADDRESSES[role]}/24", "dev", PORT_0[0])
    binds = [Bind(ray_environment.environment(), ray_environment.PLACE), checkout]
    return FreshNode(netns=plugs.netns, bind=binds)


def write_env(node: FreshNode, role: str, *, address: str = "", more: str = "") -> None:
    node.run("mkdir", "-p", f"{PREFIX}/env", user="spark")
    values = {"head": ADDRESSES["head"], "token": TOKEN, "prefix": PREFIX, "more": more}
    text = ENV.format(address=address or ADDRESSES[role], **values)
    node.write(f"{PREFIX}/env/{NAMES[role]}.env", text, user="spark")


def run_step(node: FreshNode, verb: str, role: str, *more: str, given: str | None = None, user: str = "spark") -> Any:
    env = {"PYTHONPATH": CHECKOUT, "PYTHONDONTWRITEBYTECODE": "1"}
    program = (f"{PREFIX}/venv/bin/python", "-m", "tests.support.ray_on_a_node", verb, role, *more)
    output = node.run(*program, user=user, env=env, input=given, cwd=CHECKOUT, timeout=1200)
    return json.loads(output.stdout.splitlines()[-1])


def running_env(node: FreshNode, role: str) -> list[str]:
    """The verdict and the finding of the probe `running-env` for the running Ray."""
    env = {"PYTHONPATH": CHECKOUT, "PYTHONDONTWRITEBYTECODE": "1"}
    output = node.run(f"{PREFIX}/venv/bin/python", "-c", LOOK, role, user="spark", env=env, cwd=CHECKOUT)
    return list(json.loads(output.stdout))


def main_pid(node: FreshNode, unit: str) -> str:
    return node.run("systemctl", "show", "-P", "MainPID", unit).stdout.strip()


def both_in_ray(pair: Pair) -> bool:
    found = run_step(pair.head, "probe", "head")["ray-nodes"]
    return bool(found["verdict"] == "pass")


def test_unit_passes_quoted_words_unchanged(pair: Pair) -> None:
    hostile = ["%n", "$HOME ${HOME} $$", "a \"b\" 'c'", "back\\slash \\n \\x41", ";", "#", "-x", "ä ☃", "", "a=b", "|"]
    program = "import json, sys; print(json.dumps(sys.argv[1:]))"
    words = " ".join(map(systemd.word, ["-c", program, *hostile]))
    text = f"[Service]\nType=oneshot\nStandardOutput=file:/tmp/words\nExecStart=/usr/bin/python3 {words}\n"
    pair.head.write("/etc/systemd/system/words.service", text)
    pair.head.run("systemctl", "daemon-reload")
    pair.head.run("systemctl", "start", "words.service")
    assert json.loads(pair.head.read("/tmp/words")) == hostile


def test_ray_of_a_worker_without_its_head_fails(pair: Pair) -> None:
    report = run_step(pair.worker, "converge", "worker", "token_file=-", given="0123456789abcdef-not-the-heads\n")
    assert report["outcome"] == "failed"
    assert report["message"] == "ray-worker.service does not start"
    assert report["cause"].startswith("the head does not answer at 192.0.2.1:6379: ")
    assert "on the head" in report["hint"]


def test_ray_with_an_address_on_no_interface_names_the_addresses(pair: Pair) -> None:
    write_env(pair.head, "head", address="192.0.2.77")
    report = run_step(pair.head, "converge", "head")
    assert report["cause"].startswith(
        "the address 192.0.2.77 is on no interface after 3 s; found: lo 127.0.0.1/8, enp1s0f0np0 192.0.2.1/24"
    )
    assert "sparkinstall run network" in report["hint"]
    write_env(pair.head, "head")


def test_ray_of_the_head_starts(pair: Pair) -> None:
    report = run_step(pair.head, "converge", "head")
    assert report["outcome"] == "changed", report
    assert pair.head.run("stat", "-c", "%a %U", TOKEN).stdout.split() == ["600", "spark"]
    found = run_step(pair.head, "probe", "head")["ray-nodes"]
    assert found["verdict"] == "fail"
    assert "not in Ray: 192.0.2.2" in found["found"]


def test_ray_of_a_worker_with_a_wrong_token_fails(pair: Pair) -> None:
    report = run_step(pair.worker, "converge", "worker")
    assert report["message"] == "ray-worker.service does not start"
    assert report["cause"] == f"the head at 192.0.2.1:6379 rejects this node's token: {TOKEN} differs from the head's"
    assert f"ssh 192.0.2.1 cat {TOKEN} | sparkinstall multi-node --role worker" in report["hint"]


def test_ray_of_a_worker_with_the_heads_token_joins(pair: Pair) -> None:
    token = pair.head.run("cat", TOKEN).stdout
    report = run_step(pair.worker, "converge", "worker", "token_file=-", given=token)
    assert report["outcome"] == "changed", report
    assert run_step(pair.head, "probe", "head")["ray-nodes"]["found"] == "192.0.2.1, 192.0.2.2"
    assert run_step(pair.worker, "probe", "worker")["ray-nodes"]["verdict"] == "pass"


def test_ray_spreads_a_placement_group_over_both_nodes(pair: Pair) -> None:
    script = f'. {PREFIX}/env/{NAMES["head"]}.env; exec python -W ignore -c "$0"'
    output = pair.head.run("bash", "-c", script, SPREAD, user="spark", timeout=900)
    assert json.loads(output.stdout.splitlines()[-1]) == list(ADDRESSES.values())


def test_ray_listens_only_on_ports_of_the_firewall(pair: Pair) -> None:
    # Its metrics come last.
    until(lambda: f":{ray_ports.AUTOSCALER_METRICS} " in pair.head.run("ss", "-ltnH").stdout, 120)
    for node, own in ((pair.head, (6379, ray_ports.CLIENT)), (pair.worker, ())):
        lines = node.run("ss", "-ltnH").stdout.splitlines()
        addresses = [line.split()[3] for line in lines]
        open_ports = {int(each.rpartition(":")[2]) for each in addresses if not each.startswith(("127.", "[::1]"))}
        first, last = ray_ports.BETWEEN_NODES
        assert {port for port in open_ports if not first <= port <= last} - {22, *own} == set()


def test_token_is_in_no_journal_and_no_argument(pair: Pair) -> None:
    token = pair.head.run("cat", TOKEN).stdout.strip()
    for node in pair:
        assert token not in node.run("journalctl", "--no-pager").stdout
        assert token not in node.run("ps", "axww", "-o", "args").stdout
        assert (
            token
            not in node.run("sh", "-c", "cat /var/lib/sparkinstall/journal.jsonl /var/lib/sparkinstall/logs/*/*").stdout
        )


def test_token_with_a_loose_mode_is_restricted_without_a_restart(pair: Pair) -> None:
    before = main_pid(pair.head, "ray-head")
    pair.head.run("chmod", "0644", TOKEN)
    (drift,) = run_step(pair.head, "plan", "head")["drifts"]
    assert drift == f"let nobody but spark read {TOKEN} (its mode is 644)"
    assert run_step(pair.head, "converge", "head")["outcome"] == "changed"
    assert pair.head.run("stat", "-c", "%a", TOKEN).stdout.strip() == "600"
    assert main_pid(pair.head, "ray-head") == before


def test_ray_applied_twice_changes_and_restarts_nothing(pair: Pair) -> None:
    before = main_pid(pair.head, "ray-head")
    assert run_step(pair.head, "converge", "head")["outcome"] == "unchanged"
    assert main_pid(pair.head, "ray-head") == before


def test_ray_with_a_changed_env_file_restarts(pair: Pair) -> None:
    before = main_pid(pair.worker, "ray-worker")
    assert running_env(pair.worker, "worker") == ["pass", "ray-worker.service: as in the env file"]
    write_env(pair.worker, "worker", more='NCCL_DEBUG="INFO"')
    assert running_env(pair.worker, "worker") == ["warn", "ray-worker.service was started with no NCCL_DEBUG"]
    (drift,) = run_step(pair.worker, "plan", "worker")["drifts"]
    assert drift == f"start ray-worker.service: changed since its last start: {PREFIX}/env/multi-node-worker.env"
    assert run_step(pair.worker, "converge", "worker")["outcome"] == "changed"
    assert main_pid(pair.worker, "ray-worker") != before
    assert run_step(pair.worker, "plan", "worker")["outcome"] == "unchanged"
    assert running_env(pair.worker, "worker")[0] == "pass"
    until(lambda: both_in_ray(pair), pause=2)


@pytest.mark.parametrize(("whose", "process"), [("worker", "raylet"), ("head", "gcs_server")])
def test_ray_that_is_killed_restarts(pair: Pair, whose: str, process: str) -> None:
    node = getattr(pair, whose)
    before = main_pid(node, f"ray-{whose}")
    node.run("pkill", "-9", "-x", process)
    until(lambda: main_pid(node, f"ray-{whose}") not in (before, "0"), pause=2)
    until(lambda: both_in_ray(pair), pause=2)


def test_ray_after_reboots_has_both_nodes(pair: Pair) -> None:
    pair.worker.reboot()
    until(lambda: both_in_ray(pair), pause=2)
    pair.head.reboot()
    until(lambda: both_in_ray(pair), pause=2)


def test_vllm_restarts_with_its_ray(pair: Pair) -> None:
    # vLLM on Ray needs a GPU; how systemd treats the two units shows with any program instead of vLLM.
    pair.head.run("mkdir", "/etc/systemd/system/vllm.service.d")
    substitute = "[Service]\nExecStart=\nExecStart=/bin/sleep infinity\n"
    pair.head.write("/etc/systemd/system/vllm.service.d/lab.conf", substitute)
    report = run_step(pair.head, "converge", "head", "step=serving", "serving.model=/srv/model")
    assert report["outcome"] == "changed", report
    before = main_pid(pair.head, "vllm")
    pair.head.run("pkill", "-9", "-x", "gcs_server")
    until(lambda: main_pid(pair.head, "vllm") not in ("0", before), pause=2)


def test_uninstall_removes_ray(pair: Pair) -> None:
    for node, role in zip(pair, ADDRESSES, strict=True):
        outcomes = {each["outcome"] for each in run_step(node, "uninstall", role)}
        assert outcomes <= {"removed", "restored", "nothing"}, outcomes
        shown = node.run("systemctl", "show", "-P", "LoadState", "-P", "ActiveState", f"ray-{role}").stdout.split()
        assert shown == ["not-found", "inactive"]
        assert node.run("pgrep", "-x", "raylet", check=False).stdout == ""
        assert node.run("ls", PREFIX).stdout.split() == ["env", "venv"]
