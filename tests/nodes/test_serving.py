"""vLLM itself, built for the CPU, as units of systemd: alone on one node, then spread over two with a cable.

The nodes live through the whole file; the tests are their days, in order.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from tests.lab.cabling import PORT_0, Cabling, Plugs, ip
from tests.lab.node import Bind, FreshNode
from tests.nodes.fresh import REPOSITORY
from tests.support import vllm_on_cpu
from tests.support.ray_on_a_node import ADDRESSES

pytestmark = [pytest.mark.layer2, pytest.mark.layer3, pytest.mark.layer5, pytest.mark.network]

CHECKOUT = "/srv/checkout"
PREFIX = "/opt/sparkinstall"
MODEL = "/srv/model"
UNIT = "vllm.service"
NAMES = {"single": "single-node", "head": "multi-node-head", "worker": "multi-node-worker"}
SETTINGS = ("step=serving", "cluster.executor=mp", f"serving.model={MODEL}", "serving.max_model_len=512")
# Seconds: two processes on two busy cores, that import PyTorch and meet.
LOADED = 420
# What the probe gives a completion, and then /health, before it says that none came.
PATIENCE = 60 + 15
ENV = """\
# As the step `env-files` makes it, but for NCCL and CUDA.
set -a
VLLM_HOST_IP="{address}"
VLLM_PORT="29600"
{link}
VIRTUAL_ENV="{prefix}/venv"
set +a
: <<'SYSTEMD'
PATH="{prefix}/venv/bin:/usr/local/bin:/usr/bin:/bin"
SYSTEMD
. "{prefix}/venv/bin/activate"
"""
LINK = "".join(f'{name}_SOCKET_IFNAME="{PORT_0[0]}"\n' for name in ("NCCL", "GLOO", "TP"))
# What a CPU needs and a Spark does not. The unit itself is the one that a Spark gets.
ON_A_CPU = f"""\
[Service]
Environment=LD_PRELOAD={":".join(vllm_on_cpu.PRELOADED)}
Environment=VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1
# What PyTorch would compile needs a compiler, which these nodes have not.
Environment=TORCHDYNAMO_DISABLE=1 VLLM_NO_USAGE_STATS=1
"""
ASK = """
import json, sys, urllib.request
path, body = sys.argv[1], sys.argv[2].encode() or None
asked = urllib.request.Request("http://127.0.0.1:8000" + path, body, {"Content-Type": "application/json"})
print(urllib.request.urlopen(asked, timeout=float(sys.argv[3])).read().decode())
"""


@dataclass(frozen=True)
class Pair:
    wires: Cabling
    plugs: Plugs
    head: FreshNode
    worker: FreshNode

    @property
    def nodes(self) -> dict[str, FreshNode]:
        return {"head": self.head, "worker": self.worker}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    model = vllm_on_cpu.model(tmp_path_factory.mktemp("model"))
    model.chmod(0o755)
    parts = [Bind(vllm_on_cpu.environment(), vllm_on_cpu.PLACE), Bind(REPOSITORY, CHECKOUT), Bind(model, MODEL)]
    with ExitStack() as stack:
        wires = Cabling(direct=True)
        stack.callback(wires.remove)
        plugs = {role: wires.give_place(role, PORT_0[:1]) for role in ADDRESSES}
        nodes = [stack.enter_context(_node(wires, plugs[role], address, parts)) for role, address in ADDRESSES.items()]
        for node in nodes:
            _equip(node)
        yield Pair(wires, plugs["worker"], *nodes)


def _node(wires: Cabling, plugs: Plugs, address: str, parts: Sequence[Bind]) -> FreshNode:
    wires.power_on(plugs)
    ip(plugs.netns, "addr", "add", f"{address}/24", "dev", PORT_0[0])
    return FreshNode(netns=plugs.netns, bind=parts)


def _equip(node: FreshNode) -> None:
    node.run("install", "-d", "-o", "spark", "-g", "spark", PREFIX)
    node.run("mkdir", "-p", f"{PREFIX}/env", user="spark")
    node.run("mkdir", f"/etc/systemd/system/{UNIT}.d")
    node.write(f"/etc/systemd/system/{UNIT}.d/cpu.conf", ON_A_CPU)


def _write_env(node: FreshNode, role: str) -> None:
    address, link = ("127.0.0.1", "") if role == "single" else (ADDRESSES[role], LINK)
    text = ENV.format(address=address, link=link, prefix=PREFIX)
    node.write(f"{PREFIX}/env/{NAMES[role]}.env", text, user="spark")


def _do(node: FreshNode, verb: str, role: str) -> Any:
    env = {"PYTHONPATH": CHECKOUT, "PYTHONDONTWRITEBYTECODE": "1"}
    program = (f"{PREFIX}/venv/bin/python", "-m", "tests.support.ray_on_a_node", verb, role, *SETTINGS)
    said = node.run(*program, user="spark", env=env, cwd=CHECKOUT, timeout=600)
    return json.loads(said.stdout.splitlines()[-1])


def _set_up(node: FreshNode, role: str) -> None:
    _write_env(node, role)
    told = _do(node, "converge", role)
    assert told["outcome"] == "changed", told


def _probed(node: FreshNode, role: str) -> dict[str, Any]:
    return dict(_do(node, "probe", role)["serving"])


def _until_it_serves(node: FreshNode, role: str, seconds: float = LOADED) -> None:
    """Wait until the probe passes; while vLLM loads it may only warn of that."""
    deadline = time.monotonic() + seconds
    while (found := _probed(node, role))["verdict"] != "pass":
        assert found["verdict"] == "warn", (found, _journal(node))
        assert time.monotonic() < deadline, (found, _journal(node))
        time.sleep(2)


def _journal(node: FreshNode, lines: int = 400) -> str:
    return node.run("journalctl", "-u", UNIT, "-o", "cat", "--no-pager", "-n", str(lines)).stdout


def _ask(node: FreshNode, path: str, within: float = 60, **body: Any) -> str:
    given = json.dumps({"model": MODEL, **body}) if body else ""
    return node.run("python3", "-I", "-c", ASK, path, given, str(within), timeout=within + 30).stdout


def _state(node: FreshNode) -> list[str]:
    return node.run("systemctl", "show", "--value", "-p", "ActiveState", "-p", "UnitFileState", UNIT).stdout.split()


def _main_pid(node: FreshNode) -> str:
    return node.run("systemctl", "show", "-P", "MainPID", UNIT).stdout.strip()


def _continued(node: FreshNode) -> str:
    """What the model makes of a few words; it never draws by lot."""
    said = json.loads(_ask(node, "/v1/completions", prompt="One, two,", max_tokens=6, temperature=0))
    assert said["usage"]["completion_tokens"] == 6
    return str(said["choices"][0]["text"])


@pytest.fixture(scope="module")
def alone(pair: Pair) -> str:
    """What one node by itself answers."""
    _set_up(pair.head, "single")
    _until_it_serves(pair.head, "single")
    return _continued(pair.head)


def test_one_node_alone_serves_and_streams(pair: Pair, alone: str) -> None:
    assert alone
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "ignore_eos": True}
    said = _ask(pair.head, "/v1/chat/completions", stream=True, **asked)
    events = [line.removeprefix("data: ") for line in said.splitlines() if line]
    assert events[-1] == "[DONE]"
    last = json.loads(events[-2])
    assert last["choices"][0]["finish_reason"] == "length", last
    assert len(events) > 5


def test_two_nodes_share_the_model_and_answer_as_one(pair: Pair, alone: str) -> None:
    for role, node in pair.nodes.items():
        _set_up(node, role)
    _until_it_serves(pair.head, "head")
    assert [_state(node) for node in pair.nodes.values()] == [["active", "enabled"]] * 2
    assert _continued(pair.head) == alone
    assert _probed(pair.worker, "worker")["verdict"] == "skip"
    assert "TP rank 1" in _journal(pair.worker)


def test_with_the_link_down_the_probe_says_so_though_health_is_well(pair: Pair) -> None:
    pair.wires.pull(pair.plugs, PORT_0[:1])
    try:
        began = time.monotonic()
        found = _probed(pair.head, "head")
        took = time.monotonic() - began
        _ask(pair.head, "/health", within=5)
    finally:
        pair.wires.insert(pair.plugs, PORT_0[:1])
    assert found["verdict"] == "fail"
    assert found["found"] == "no completion within 60 s, though /health says 200"
    assert "`sparkinstall verify --only peers`" in found["mend"]
    assert took < PATIENCE + 15


def test_when_the_cable_is_back_it_serves_again_by_itself(pair: Pair) -> None:
    before = _main_pid(pair.head)
    until = time.monotonic() + 240
    while (found := _probed(pair.head, "head"))["verdict"] != "pass":
        assert time.monotonic() < until, (found, _journal(pair.head))
    assert _main_pid(pair.head) == before


def test_a_worker_is_started_again_with_its_head(pair: Pair) -> None:
    before = _main_pid(pair.worker)
    pair.head.run("systemctl", "restart", UNIT, timeout=120)
    _until_it_serves(pair.head, "head")
    assert _main_pid(pair.worker) != before
    assert "sparkinstall: vLLM on the head, 192.0.2.1, has ended" in _journal(pair.worker, 2000)
    assert _do(pair.worker, "plan", "worker")["outcome"] == "unchanged"


def test_all_of_it_goes_again(pair: Pair) -> None:
    for role, node in pair.nodes.items():
        outcomes = {each["outcome"] for each in _do(node, "uninstall", role)}
        assert outcomes <= {"removed", "restored", "nothing"}, outcomes
        shown = node.run("systemctl", "show", "-P", "LoadState", "-P", "ActiveState", UNIT).stdout.split()
        assert shown[1] == "inactive"
        assert node.run("pgrep", "-f", "vllm", check=False).stdout == ""
        assert node.run("ls", PREFIX).stdout.split() == ["env", "venv"]
