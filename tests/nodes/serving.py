"""Nodes with vLLM built for the CPU as a unit of systemd, and what the tests of serving do there."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparkinstall.layout import API_KEY
from tests.lab.cabling import PORT_0, Cabling, Plugs, ip
from tests.lab.fleet import Fleet
from tests.lab.node import Bind, FreshNode
from tests.nodes.fresh import CPU_STACK, compiled_checkout, ignoring, let_pytorch_find_cuda, own_cache
from tests.support import vllm_on_cpu
from tests.support.ray_on_a_node import ADDRESSES
from tests.support.waiting import until

CHECKOUT, PACKAGES = "/srv/checkout", "/srv/packages"
PREFIX = "/opt/sparkinstall"
MODEL, REASONER = "/srv/model", "/srv/reasoner"
UNIT = "vllm.service"
KEY = "VLLM_API_KEY"
NAMES = {"single": "single-node", "head": "multi-node-head", "worker": "multi-node-worker"}
CHECKOUT_ENV = {"PYTHONPATH": CHECKOUT, "PYTHONDONTWRITEBYTECODE": "1"}
SETTINGS = ("step=serving", "cluster.executor=mp", f"serving.model={MODEL}", "serving.max_model_len=512")
# Seconds for two processes on busy cores to import PyTorch and connect: no working machine needs them.
LOAD_SECONDS = 1200
ENV = """\
# Like that of the step `env-files`, without NCCL and CUDA.
set -a
VLLM_HOST_IP="{address}"
VLLM_PORT="29600"
{link}
VIRTUAL_ENV="{prefix}/venv"
SPT_NOENV="1"
set +a
: <<'SYSTEMD'
PATH="{prefix}/venv/bin:/usr/local/bin:/usr/bin:/bin"
SYSTEMD
. "{prefix}/venv/bin/activate"
"""
LINK = "".join(f'{name}_SOCKET_IFNAME="{PORT_0[0]}"\n' for name in ("NCCL", "GLOO", "TP"))
ASK = """
import json, sys, urllib.request
path, body = sys.argv[1], sys.argv[2].encode() or None
asked = urllib.request.Request("http://127.0.0.1:8000" + path, body, {"Content-Type": "application/json"})
print(urllib.request.urlopen(asked, timeout=float(sys.argv[3])).read().decode())
"""

BEGIN = """
from sparkinstall.events import silent
from sparkinstall.journal.state_dir import StateFolder
from sparkinstall.system.local import LocalSystem
with StateFolder(LocalSystem()).hold("test", silent):
    pass
"""

# This is no Spark, and the test has set it up itself.
NOT_HERE = ("machine", "arch", "os", "driver", "memory", "disk", "cuda", "prefix")
AGREED = ("--yes", *(word for name in NOT_HERE for word in ("--ignore", name)))
UNWATCHED = ("--set", "serving.life.enabled=false")

Found = dict[str, dict[str, Any]]

LIFE = "vllm-life.service"
# Of seconds, where a Spark waits for minutes.
SHORT = {"every": 1, "still": 10, "probe_every": 6, "probe": 15, "start": 1200}
LIVELY = tuple(f"serving.life.{name}_seconds={seconds}" for name, seconds in SHORT.items())


@dataclass(frozen=True)
class ServingNodes:
    """The nodes by their roles, and the cable between them."""

    wires: Cabling
    plugs: dict[str, Plugs]
    nodes: dict[str, FreshNode]

    @property
    def head(self) -> FreshNode:
        return self.nodes["head"]

    @property
    def worker(self) -> FreshNode:
        return self.nodes["worker"]


INSTALLED = f"""\
stack: {CPU_STACK}
# vLLM for the CPU has no use for NCCL: what torch comes with counts.
nccl: {{mode: wheel}}
"""
# What the service needs on a CPU; with NCCL as in the env file, whose LD_PRELOAD it replaces.
CPU_ENV = "/etc/vllm-cpu.env"
NCCL = f"{vllm_on_cpu.PLACE}/{vllm_on_cpu.SITE}/nvidia/nccl/lib/libnccl.so.2"


@contextmanager
def installed_node(scratch: Path) -> Iterator[FreshNode]:
    """A node on which `./install.sh` has installed vLLM for the CPU, as the README says."""
    binds = [*own_cache("serving-cache", on_cpu=True), *_models(scratch), compiled_checkout(scratch, CHECKOUT)]
    with Fleet(1, bind=lambda _: binds) as fleet:
        (node,) = fleet.nodes
        ip(node.plugs.netns, "addr", "add", f"{ADDRESSES['head']}/24", "dev", PORT_0[0])
        node.run("chown", "spark:spark", "/home/spark/.cache")
        let_pytorch_find_cuda(node)
        node.write("/etc/sparkinstall.yaml", INSTALLED)
        node.run("mkdir", f"/etc/systemd/system/{UNIT}.d")
        node.write(f"/etc/systemd/system/{UNIT}.d/cpu.conf", f"[Service]\nEnvironmentFile={CPU_ENV}\n")
        node.write(CPU_ENV, vllm_on_cpu.VARIABLES.replace(".so\n", f".so:{NCCL}\n", 1))
        node.run("./install.sh", "--yes", *ignoring(), "--ignore", "cuda", user="spark", cwd=CHECKOUT, timeout=1200)
        yield node


@contextmanager
def serving_nodes(scratch: Path, *roles: str) -> Iterator[ServingNodes]:
    """Nodes of these roles; `scratch` is for what they have in common."""
    parts = [Bind(vllm_on_cpu.environment(), vllm_on_cpu.PLACE), compiled_checkout(scratch, CHECKOUT)]
    parts += [*_models(scratch), Bind(vllm_on_cpu.search_library(), PACKAGES)]
    with ExitStack() as stack:
        wires = Cabling(direct=len(roles) > 1)
        stack.callback(wires.remove)
        plugs = {role: wires.add(role, PORT_0[:1]) for role in roles}
        nodes = {role: stack.enter_context(_node(wires, plugs[role], ADDRESSES[role], parts)) for role in roles}
        for node in nodes.values():
            _prepare(node)
        yield ServingNodes(wires, plugs, nodes)


def _models(scratch: Path) -> list[Bind]:
    models = {MODEL: vllm_on_cpu.model(scratch / "model"), REASONER: vllm_on_cpu.reasoning_model(scratch / "reasoner")}
    return [Bind(folder, place) for place, folder in models.items()]


def _node(wires: Cabling, plugs: Plugs, address: str, parts: Sequence[Bind]) -> FreshNode:
    wires.power_on(plugs)
    ip(plugs.netns, "addr", "add", f"{address}/24", "dev", PORT_0[0])
    return FreshNode(netns=plugs.netns, bind=parts)


def _prepare(node: FreshNode) -> None:
    node.run("install", "-d", "-o", "spark", "-g", "spark", PREFIX)
    node.run("mkdir", "-p", f"{PREFIX}/env", user="spark")
    node.run("mkdir", f"/etc/systemd/system/{UNIT}.d")
    node.write(f"/etc/systemd/system/{UNIT}.d/cpu.conf", vllm_on_cpu.DROP_IN)
    # An environment without a journal would count as one whose journal is lost.
    node.run(f"{PREFIX}/venv/bin/python", "-c", BEGIN, user="spark", env=CHECKOUT_ENV)


def write_env(node: FreshNode, role: str) -> None:
    address, link = ("127.0.0.1", "") if role == "single" else (ADDRESSES[role], LINK)
    text = ENV.format(address=address, link=link, prefix=PREFIX)
    node.write(f"{PREFIX}/env/{NAMES[role]}.env", text, user="spark")


def run_step(node: FreshNode, verb: str, role: str, *settings: str, key: str = "") -> Any:
    env = {**CHECKOUT_ENV, **({KEY: key} if key else {})}
    output = node.run(*program(verb, role, *settings), user="spark", env=env, cwd=CHECKOUT, timeout=LOAD_SECONDS)
    return json.loads(output.stdout.splitlines()[-1])


def program(verb: str, role: str, *settings: str) -> tuple[str, ...]:
    python = f"{PREFIX}/venv/bin/python"
    return (python, "-m", "tests.support.ray_on_a_node", verb, role, *SETTINGS, *settings)


def set_up(node: FreshNode, role: str, *settings: str) -> None:
    write_env(node, role)
    report = run_step(node, "converge", role, *settings)
    assert report["outcome"] == "changed", report


def findings(node: FreshNode, role: str, *settings: str, key: str = "") -> Found:
    """The findings of the API's probes; another one must find that vLLM takes all that these tests start it with."""
    found = dict(run_step(node, "probe", role, *settings, key=key))
    before = found.pop("vllm-arguments")
    assert before["verdict"] == "pass", before
    return found


def serving_finding(node: FreshNode, role: str) -> dict[str, Any]:
    return dict(findings(node, role)["serving"])


def until_it_serves(node: FreshNode, role: str, *settings: str, key: str = "") -> Found:
    """Wait until the probe passes; while vLLM loads it may only warn, and the others are skipped."""
    deadline = time.monotonic() + LOAD_SECONDS
    while (found := findings(node, role, *settings, key=key))["serving"]["verdict"] != "pass":
        assert found["serving"]["verdict"] == "warn", (found, journal(node))
        assert time.monotonic() < deadline, (found, journal(node))
        assert_others_skip(found)
        time.sleep(4)
    return found


def assert_others_skip(found: Found) -> None:
    others = [each for name, each in found.items() if name != "serving"]
    assert [each["found"] for each in others] == ["no completion came: see `serving`"] * 2
    assert [each["verdict"] for each in others] == ["skip"] * 2


def journal(node: FreshNode, lines: int = 400) -> str:
    return node.run("journalctl", "-u", UNIT, "-o", "cat", "--no-pager", "-n", str(lines)).stdout


def ask(node: FreshNode, path: str, within: float = 300, **body: Any) -> str:
    given = json.dumps({"model": MODEL, **body}) if body else ""
    return node.run("python3", "-I", "-c", ASK, path, given, str(within), timeout=within + 30).stdout


def state(node: FreshNode) -> list[str]:
    return node.run("systemctl", "show", "--value", "-p", "ActiveState", "-p", "UnitFileState", UNIT).stdout.split()


def main_pid(node: FreshNode) -> str:
    return node.run("systemctl", "show", "-P", "MainPID", UNIT).stdout.strip()


def completion(node: FreshNode) -> str:
    """The model's completion of a few words, without sampling."""
    output = json.loads(ask(node, "/v1/completions", prompt="One, two,", max_tokens=6, temperature=0))
    assert output["usage"]["completion_tokens"] == 6
    return str(output["choices"][0]["text"])


def reasoning_settings(*arguments: str) -> tuple[str, str]:
    """Settings for the reasoning model with these arguments of vLLM."""
    return f"serving.model={REASONER}", f"serving.arguments={json.dumps(arguments)}"


def set_up_life(node: FreshNode, role: str, *settings: str) -> None:
    report = run_step(node, "converge", role, *settings, *LIVELY, "step=life")
    assert report["outcome"] in ("changed", "unchanged"), report


def life_says(node: FreshNode, words: str, since: float, within: float = LOAD_SECONDS) -> str:
    """Wait until the proof of life has said this in systemd's journal since a time; return the last such line."""
    deadline = time.monotonic() + within
    while True:
        said = node.run("journalctl", "-u", LIFE, "-o", "cat", "--no-pager", f"--since=@{since:.6f}").stdout
        if found := [line for line in said.splitlines() if words in line]:
            return str(found[-1])
        assert time.monotonic() < deadline, (words, said, journal(node))
        time.sleep(1)


def life_state(node: FreshNode) -> dict[str, Any]:
    # A service that has just started has noted nothing yet.
    until(lambda: node.run("test", "-e", "/run/vllm-life/state.json", check=False).returncode == 0)
    return dict(json.loads(node.read("/run/vllm-life/state.json")))


def until_it_completes(node: FreshNode) -> None:
    deadline = time.monotonic() + LOAD_SECONDS
    given = json.dumps({"model": MODEL, "prompt": "One, two,", "max_tokens": 1})
    ask = ("python3", "-I", "-c", ASK, "/v1/completions", given, "30")
    while node.run(*ask, check=False).returncode:
        assert time.monotonic() < deadline, (journal(node), node.run("journalctl", "-u", LIFE, "-n", "40").stdout)
        time.sleep(2)


def uninstall(node: FreshNode, role: str) -> None:
    """Remove all that the tests have set up there, and require that nothing is left."""
    left = [each for each in run_step(node, "uninstall", role) if each["outcome"] in ("kept", "failed")]
    assert left == []
    assert_no_service_is_left(node)
    assert node.run("ls", PREFIX).stdout.split() == ["env", "venv"]


def assert_no_service_is_left(node: FreshNode) -> None:
    shown = node.run("systemctl", "show", "-P", "LoadState", "-P", "ActiveState", UNIT).stdout.split()
    assert shown[1] == "inactive"
    assert node.run("pgrep", "-f", "vllm", check=False).stdout == ""
    for path in (API_KEY, "/var/lib/vllm-life", "/run/vllm-life", "/usr/local/lib/vllm-life.py"):
        assert node.run("ls", path, check=False).returncode != 0, path
