"""A `Reader` runs read-only commands only, and so do checks and probes; each undo function and its commands."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Unpack, get_args

import pytest
from msgspec.structs import replace

from sparkinstall import payloads
from sparkinstall.core import catalogue, checks
from sparkinstall.errors import CommandFailed, Problem
from sparkinstall.journal.undo import OWN_KINDS
from sparkinstall.node import Node
from sparkinstall.own_files import read_regular
from sparkinstall.probes import bandwidth
from sparkinstall.probes.preflight import preflight
from sparkinstall.system import UNDO_FUNCTIONS, Result, RunOptions, System, Undo, read_only
from sparkinstall.system.local import LocalReader, LocalSystem
from sparkinstall.system.read_only import MayChange
from tests.support.machine import Machine
from tests.support.nodes import node_of, system_of
from tests.support.recording import RecordingSystem
from tests.support.sysfs import spark

PACKAGE = Path(__file__).parents[2] / "sparkinstall"
READS = """\
ip -j address
ip -j neighbour show to 192.168.100.11 dev enp1s0f0np0
ip -j neighbour show nud permanent
ip -j -4 route show table main
ip -br link
sudo -n true
sudo -n -v
nft -j list ruleset
sudo -n /usr/sbin/nft -nn list table inet sparkinstall
unshare --map-root-user --net /usr/sbin/nft -c 'table inet x {}'
systemctl show vllm.service --property=ActiveState
systemctl -q is-active firewalld
systemctl show --property=LoadState --value -- -.mount
systemctl --failed --no-pager --plain
journalctl -u vllm.service -o cat -n 400 --since=@1 -q --no-pager
journalctl -k --boot=-1 -o cat -n 20000 -q --no-pager
fwupdmgr get-updates --json --no-unreported-check --no-metadata-check
ninja --version
journalctl --no-pager --boot --output=json --output-fields=MESSAGE_ID --lines=20 UNIT=vllm.service MESSAGE_ID=39f5
env DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 apt-get -y -o DPkg::Lock::Timeout=600 -s purge gcc
apt-get -y -o APT::Install-Recommends=false -o Dir::Etc::sourcelist=/c/debs/sources.list -s --no-remove install git
make -j4 -C /src src.build BUILDDIR=/b 'NVCC_GENCODE=-gencode=arch=compute_121,code=sm_121' -n
git ls-remote --exit-code https://example.org/x.git v1
git -C /cache/x.git rev-parse 'v1^{commit}'
timeout -k 2 30 iperf3 -s -1 -B 192.168.100.10 -p 5201
netplan generate --root-dir /tmp/x
ssh -o BatchMode=yes -o ConnectTimeout=10 192.168.100.10 'cat /opt/sparkinstall/ray-token'
bash -c '. "$1" && shift && exec "$@"' bash /x.env /c/all_reduce_perf -b 8388608 -e 8388608 -g 2
bash -c '. "$1" && shift && exec "$@"' bash /x.env python /opt/sparkinstall/services/ray-nodes.py 192.168.100.10:6379 20
"""
CHANGES = """\
ip neighbour flush to 192.168.100.11 dev enp1s0f0np0
ip address add 192.168.100.10/24 dev enp1s0f0np0
sudo -n ip link set dev enp1s0f0np0 mtu 1500
nft -f /etc/x.nft
nft delete table inet sparkinstall
nft flush ruleset
iptables -F
ethtool -s enp1s0f0np0 speed 1000
systemctl stop vllm.service
systemctl daemon-reload
systemctl --now enable vllm.service
journalctl --rotate
fwupdmgr get-updates --json
fwupdmgr refresh
fwupdmgr upgrade --json --no-unreported-check --no-metadata-check
ninja -C /x
journalctl --vacuum-time=1s
env DEBIAN_FRONTEND=noninteractive apt-get -y purge gcc
sudo -n apt-get install gcc
make -C /src src.build
git clone https://example.org/x.git /x
git -C /cache/x.git gc
netplan apply
sh -ec 'netplan apply'
sh -c true
bash -c 'rm -rf /opt'
bash -c '. "$1" && shift && exec "$@"' bash /opt/x.env rm -rf /opt
ssh 192.168.100.10 reboot
python -m pip install x
/opt/sparkinstall/venv/bin/python -I -m pip install x
uv pip install x
rm -rf /opt
tee /etc/hosts
ip neigh f dev enp1s0f0np0
ip a d 192.168.100.10/24 dev enp1s0f0np0
ip link d enp1s0f0np0
ip -batch /tmp/x
ip netns exec x true
nft -f list
nft delete table list
nvidia-smi --gpu-reset
nvidia-smi -pm 1
ss -K dst 192.0.2.1
nvcc x.cu -o x
systemctl --failed stop ssh
systemctl -p show stop ssh
systemctl -H status reboot
journalctl --rot
journalctl --cursor-file=/tmp/x
env LD_PRELOAD=/tmp/x.so true
apt-get -o -s purge gcc
apt-get -y -o Dir::Bin::dpkg=/tmp/x -s install git
apt-get -y -o Dir::Etc::sourcelist=/tmp/x install git
apt-cache gencaches
make -j4 -C /src src.build
git clone https://example.org/x rev-parse
git ls-remote --upload-pack=/tmp/x file:///tmp/y
bash -c '. "$1" && shift && exec "$@"' bash /x.env rm -rf /opt
unshare --net sh -c 'rm -rf /opt' sh x
unshare --map-root-user --net rm -rf nft list tables
ssh -o BatchMode=yes -o ConnectTimeout=10 192.168.100.10 'cat x; reboot'
ssh -o BatchMode=yes -o ConnectTimeout=10 192.168.100.10 'cat x > y'
python -c 'import shutil; shutil.rmtree("/opt")'
python /tmp/x.py
python /opt/sparkinstall/services/ray-nodes.py 192.168.100.10:6379 20 -- /usr/bin/rm -rf /opt
python -I -m pip install x
iperf3 -s -D --logfile /tmp/x
timeout -k 2 30 rm -rf /opt
timeout -k 2 30 iperf3 -s -1 -B 192.168.100.10 -p 5201 --logfile /tmp/x
env NCCL_DEBUG_FILE=/tmp/x true
"""


@pytest.fixture
def tmp_path(in_memory: Path) -> Path:
    return in_memory


@pytest.mark.parametrize("line", READS.splitlines())
def test_read_only_command_is_allowed(line: str) -> None:
    assert read_only.allows(shlex.split(line))


@pytest.mark.parametrize("line", CHANGES.splitlines())
def test_changing_command_is_refused(line: str) -> None:
    assert not read_only.allows(shlex.split(line))


@pytest.mark.parametrize("peer", ["", "192.168.100.11"])
@pytest.mark.parametrize("kind", get_args(bandwidth.Kind))
def test_measurement_programs_are_allowed(kind: bandwidth.Kind, peer: str, tmp_path: Path) -> None:
    node = node_in(tmp_path, "head")
    installed(tmp_path, node)
    for program in bandwidth.programs(node, SameAnswer(tmp_path, 0, "[]"), kind, (5201, 5202), peer):
        assert read_only.allows(program.argv)


def test_payload_with_a_command_is_allowed_if_the_command_is() -> None:
    load = ["python", "-c", payloads.source("gpu_load")]
    assert read_only.allows([*load, "nvidia-smi", "-q"])
    assert not read_only.allows([*load, "nvidia-smi", "--gpu-reset"])


def test_reader_refuses_a_changing_command(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for on in (LocalReader(), LocalSystem(str(tmp_path)), system_of(tmp_path)):
        with pytest.raises(MayChange, match="touch"):
            on.ask("touch", str(mark))
    assert not mark.exists()


class SameAnswer(Machine):
    """A folder as a Spark: every program has the same output, and a command that may change something is refused."""

    def __init__(self, root: Path, code: int, out: str) -> None:
        super().__init__(str(root))
        self.code, self.out, self.programs = code, out, set[str]()

    def ask(
        self, *argv: str, timeout: float = 30, env: Mapping[str, str] | None = None, root: bool = False, stdin: str = ""
    ) -> Result:
        del timeout, env, root, stdin
        read_only.require(argv)
        self.programs.add(Path(argv[0]).name)
        return Result(argv, self.code, self.out, "")


def node_in(root: Path, role: str) -> Node:
    settings = {"serving__model": "/srv/model", "serving__allow": "192.168.1.0/24"}
    return replace(node_of(root, role, **settings), rehearsal=False)


def installed(root: Path, node: Node) -> None:
    """Write what checks and probes need to run commands: programs, an environment, an env file, unit files."""
    spark(root)
    for path in ("/usr/sbin/netplan", "/usr/sbin/nft", node.env_file, node.python, node.ray_nodes, node.firewall_rules):
        Path(f"{root}{path}").parent.mkdir(parents=True, exist_ok=True)
        Path(f"{root}{path}").write_text("")
    Path(f"{root}/proc/driver/nvidia").mkdir(parents=True)
    Path(f"{root}/proc/driver/nvidia/version").write_text("NVRM version: 580.173.02\n")


def run_everything(node: Node, on: SameAnswer) -> None:
    looks = [*preflight(node), *checks.chosen(node, measure=True).probes]
    for step in catalogue.of(node):
        for resource in step.resources(node):
            run_without_a_change(lambda: resource.check(on))  # noqa: B023 - called at once
    for probe in looks:
        run_without_a_change(lambda: probe.look(on))  # noqa: B023


def run_without_a_change(look: "object") -> None:
    """Run a check or a probe: on an invented node it may fail in any way, except with a change."""
    assert callable(look)
    try:
        look()
    except MayChange:
        raise
    except (Problem, OSError, ValueError, LookupError, TypeError):
        pass


@pytest.mark.parametrize("role", ["single", "head", "worker"])
def test_checks_and_probes_run_read_only_commands_only(role: str, tmp_path: Path) -> None:
    node = node_in(tmp_path, role)
    installed(tmp_path, node)
    programs: set[str] = set()
    for code, out in ((0, ""), (1, ""), (127, ""), (0, "active\n"), (0, "[]"), (0, "table inet sparkinstall\n")):
        on = SameAnswer(tmp_path, code, out)
        run_everything(node, on)
        programs |= on.programs
    between_nodes = set() if role == "single" else {"ip", "ping"}
    assert programs >= {"systemctl", "nvidia-smi", "nft", "journalctl", "bash", *between_nodes}, (
        "checks and probes ran programs"
    )


# --- systems and kinds of undo


def test_systems_have_all_methods_of_the_protocol(tmp_path: Path) -> None:
    systems: Iterable[System] = (LocalSystem(str(tmp_path)), system_of(tmp_path), RecordingSystem())
    names = {name for name in vars(System) if not name.startswith("_")}
    for each in systems:
        assert names <= set(dir(each))


def promised_kinds() -> Iterator[str]:
    """The kind in every `Undo(...)` of the package, literal or by a constant of the module."""
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for literal, constant in re.findall(r"\bUndo\(\s*(?:\"(\w+)\"|(_?[A-Z]+)),", text):
            yield literal or re.findall(rf"^{constant} = \"(\w+)\"", text, re.MULTILINE)[0]


def test_uninstall_has_an_undo_function_for_each_kind() -> None:
    """In another process, because tests import modules too."""
    program = "import sparkinstall.core.uninstall; from sparkinstall.system import UNDO_FUNCTIONS as f; print(*f)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    assert set(promised_kinds()) == {*OWN_KINDS, *done.stdout.split()}


# --- the commands of each undo function


def test_undo_packages_purges_those_that_nothing_else_needs() -> None:
    status = "".join(f"Package: {name}\nStatus: install ok installed\n\n" for name in ("gcc", "make", "theirs"))
    apt = "env DEBIAN_FRONTEND=noninteractive"

    class Purging(RecordingSystem):
        def try_run(self, *argv: str, **how: Unpack[RunOptions]) -> Result:
            self.files.clear()
            return super().try_run(*argv, **how)

    on = Purging({"/var/lib/dpkg/status": status.encode()}, {apt: "Purg gcc\nPurg make\n"})
    records = [Undo("packages", "packages", {}, {"packages": names}) for names in (["gcc"], ["make", "gone"])]
    undone = UNDO_FUNCTIONS["packages"](records, on)
    assert (undone.outcome, undone.note) == ("removed", "gcc, make")
    (command,) = on.changed
    assert command.endswith("purge gcc make")


def test_undo_packages_keeps_those_that_others_need() -> None:
    status = "".join(f"Package: {name}\nStatus: install ok installed\n\n" for name in ("gcc", "theirs"))
    answers = {"env DEBIAN_FRONTEND=noninteractive": "Purg gcc\nRemv theirs\n", "apt-cache depends": "  Depends: gcc\n"}
    on = RecordingSystem({"/var/lib/dpkg/status": status.encode()}, answers)
    undone = UNDO_FUNCTIONS["packages"]([Undo("packages", "packages", {}, {"packages": ["gcc"]})], on)
    assert (undone.outcome, undone.note, on.changed) == ("kept", "others need them: gcc", [])


def test_undo_service_stops_and_disables_it() -> None:
    show, state = "systemctl show", "UnitFileState={}\nActiveState={}\n"
    stopped = {"systemctl disable": {show: state.format("disabled", "inactive")}}
    on = RecordingSystem(answers={show: state.format("enabled", "active")}, effects=stopped)
    undone = UNDO_FUNCTIONS["service"]([Undo("service", "vllm.service", {}, {})], on)
    assert undone.outcome == "removed"
    assert on.changed == ["systemctl stop vllm.service", "systemctl disable vllm.service"]


def test_undo_units_enables_and_starts_a_former_service() -> None:
    on = RecordingSystem(effects={"systemctl start": {"systemctl show": "UnitFileState=enabled\nActiveState=active\n"}})
    undone = UNDO_FUNCTIONS["units"]([Undo("units", "x.service", {"enabled": True, "active": True}, {})], on)
    assert undone.outcome == "restored"
    assert on.changed == ["systemctl daemon-reload", "systemctl enable x.service", "systemctl start x.service"]


def test_undo_nftables_deletes_the_table() -> None:
    answers = {
        "/usr/sbin/nft list tables": "table inet sparkinstall\n",
        "/usr/sbin/nft -nn": "table inet sparkinstall {}",
    }
    effects = {"/usr/sbin/nft delete": dict.fromkeys(answers, "")}
    on = RecordingSystem({"/usr/sbin/nft": b""}, answers, effects)
    undone = UNDO_FUNCTIONS["nftables"]([Undo("nftables", "inet sparkinstall", {}, {})], on)
    assert undone.outcome == "removed" and on.changed == ["/usr/sbin/nft delete table inet sparkinstall"]


CANNOT_TELL = {
    "service": ("vllm.service", {}, "systemd does not answer about vllm.service"),
    "nftables": ("inet sparkinstall", {"/sys/module/nf_tables/refcnt": b""}, "nft is no longer installed"),
    "packages": ("apt", {}, "it is unknown which packages are installed"),
}


@pytest.mark.parametrize(("kind", "subject", "files", "why"), [(each, *CANNOT_TELL[each]) for each in CANNOT_TELL])
def test_undo_that_cannot_see_the_change_fails(kind: str, subject: str, files: dict[str, bytes], why: str) -> None:
    """The record stays in the journal: a change that cannot be seen may still be there."""
    on = RecordingSystem(files)
    with pytest.raises(Problem, match=why) as found:
        UNDO_FUNCTIONS[kind]([Undo(kind, subject, {}, {"packages": ["gcc"]})], on)
    assert found.value.hint and not on.changed


def test_undo_nftables_in_a_kernel_without_tables_has_nothing_to_do() -> None:
    undone = UNDO_FUNCTIONS["nftables"]([Undo("nftables", "inet sparkinstall", {}, {})], RecordingSystem())
    assert undone.outcome == "nothing"


def test_undo_netplan_applies_the_restored_files_or_fails() -> None:
    before = {"enp1s0f0np0": {"mtu": 1500, "up": False, "addresses": []}}
    record = Undo("netplan", "the QSFP link", before, {"enp1s0f0np0": "192.168.100.10/24"})
    on = RecordingSystem({"/usr/sbin/netplan": b""}, {"ip -j address": '[{"ifname": "enp1s0f0np0", "mtu": 1500}]'})
    assert UNDO_FUNCTIONS["netplan"]([record], on).outcome == "restored"
    (script,) = on.changed
    assert script.startswith("sh -ec /usr/sbin/netplan apply\n")
    assert "\nip address del 192.168.100.10/24 dev enp1s0f0np0 " in script
    on.failing = ("sh -ec",)
    with pytest.raises(CommandFailed, match="netplan apply"):
        UNDO_FUNCTIONS["netplan"]([record], on)


@pytest.mark.parametrize("path", ["/proc/sys/kernel/osrelease", "/proc/meminfo", "/proc/self/maps"])
def test_files_of_the_kernel_are_read(path: str) -> None:
    assert LocalReader().read(path)


@pytest.mark.parametrize("size", [0, 1, 4, 5, 65535, 65536, 65537, 200_000])
def test_file_is_read_whole_up_to_the_limit(size: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * size)
    assert read_regular(tmp_path / "file", 200_000) == b"x" * size
    for limit in (limit for limit in (4, 65536) if limit < size):
        with pytest.raises(OSError, match="larger"):
            read_regular(tmp_path / "file", limit)
