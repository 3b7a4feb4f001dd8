"""The lab itself works, so a failure elsewhere is one of sparkinstall."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.lab import arm64, cabling, cache, commands, layers, overlay, rootfs
from tests.lab.cabling import LAN, PORT_0, PORT_1
from tests.lab.fleet import ROUTER_ADDRESS, TERMINAL_ADDRESS, Fleet, FleetNode
from tests.lab.node import Bind, FreshNode, NodeError
from tests.lab.tree import tree_digest
from tests.support.waiting import until

CABLE = "enp1s0f0np0"
REPOSITORY = Path(__file__).parents[2]


def _is_alive(pid: str) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.fixture(scope="module")
def node() -> Iterator[FreshNode]:
    with FreshNode() as fresh:
        yield fresh


@pytest.mark.layer3
def test_node_boots_to_running(node: FreshNode) -> None:
    assert node.state == "running"
    assert node.run("systemctl", "is-system-running").stdout == "running\n"
    assert node.run("cat", "/proc/1/comm").stdout == "systemd\n"
    assert node.run("hostname").stdout.strip() == node.name


@pytest.mark.layer3
def test_node_without_a_change_is_the_rootfs(node: FreshNode) -> None:
    tree = str(rootfs.trixie())
    for folder in ("/usr/bin", "/usr/lib/systemd", "/usr/sbin"):
        pristine = tree_digest(f"{tree}{folder}")
        seen = node.tree_digest(folder)
        assert {path.removeprefix(tree): digest for path, digest in pristine.items()} == seen


@pytest.mark.layer3
@pytest.mark.network
def test_apt_on_a_node_installs(node: FreshNode) -> None:
    node.run("apt-get", "update", timeout=300)
    node.run("apt-get", "install", "-y", "hello", timeout=300)
    assert node.run("hello", user="plain").stdout == "Hello, world!\n"


@pytest.mark.layer3
@pytest.mark.network
def test_pip_on_a_node_installs(node: FreshNode) -> None:
    node.run("python3", "-m", "venv", "/tmp/venv", user="spark")
    node.run("/tmp/venv/bin/pip", "install", "--quiet", "typer", user="spark", timeout=300)
    assert node.run("/tmp/venv/bin/python", "-c", "import typer; print(typer.__name__)").stdout == "typer\n"


@pytest.mark.layer3
def test_users_of_a_node_have_their_rights(node: FreshNode) -> None:
    assert node.run("sudo", "-n", "id", "-un", user="spark").stdout == "root\n"
    refused = node.run("sudo", "-n", "true", user="plain", check=False)
    assert (refused.returncode, "password is required" in refused.stderr) == (1, True)
    who = node.run("sh", "-c", "id -un; pwd; echo $HOME; umask", user="plain")
    assert who.stdout == "plain\n/home/plain\n/home/plain\n0022\n"


@pytest.mark.layer3
def test_command_on_a_node_gets_only_its_own_variables(node: FreshNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET_OF_MINE", "x")
    seen = node.run("env", env={"GIVEN": "two words $(here)"}, user="spark").stdout.splitlines()
    assert "GIVEN=two words $(here)" in seen
    assert not [line for line in seen if line.startswith("A_SECRET_OF_MINE")]


@pytest.mark.layer3
@pytest.mark.parametrize("user", ["root", "spark"])
def test_node_on_this_machines_network_cannot_change_it(node: FreshNode, user: str) -> None:
    as_root = ["sudo", "-n"] if user == "spark" else []
    before = _interfaces()
    refused = node.run(*as_root, "ip", "link", "add", "lab0", "type", "dummy", user=user, check=False)
    assert "Operation not permitted" in refused.stderr
    assert _interfaces() == before


def _interfaces() -> list[str]:
    return [each["ifname"] for each in json.loads(commands.run("ip", "-json", "link").stdout)]


@pytest.mark.layer3
def test_unit_on_a_node_starts_restarts_and_logs(node: FreshNode) -> None:
    unit = "[Service]\nExecStartPre=echo alive\nExecStart=sleep 1000\nRestart=always\nRestartSec=50ms\n"
    node.write("/etc/systemd/system/small.service", unit)
    node.run("systemctl", "daemon-reload")
    node.run("systemctl", "start", "small")
    node.run("systemctl", "kill", "--signal=KILL", "small")
    until(lambda: node.run("journalctl", "-u", "small", "-o", "cat").stdout.count("alive\n") == 2)
    until(lambda: node.run("systemctl", "is-active", "small", check=False).stdout == "active\n")
    node.run("systemctl", "stop", "small")


@pytest.mark.layer3
def test_two_nodes_do_not_share_services(node: FreshNode) -> None:
    with FreshNode() as other:
        for each in (node, other):
            each.run("systemd-run", "--unit=same", "sleep", "1000")
        other.run("systemctl", "kill", "--signal=KILL", "same")
        other.run("systemctl", "stop", "same", check=False)
        assert node.run("systemctl", "is-active", "same").stdout == "active\n"
    node.run("systemctl", "stop", "same")


@pytest.mark.layer3
def test_write_to_a_full_disk_fails(node: FreshNode) -> None:
    node.run("mkdir", "/mnt/small")
    node.run("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "/mnt/small")
    full = node.run("dd", "if=/dev/zero", "of=/mnt/small/x", "bs=1M", "count=1", check=False)
    assert "No space left on device" in full.stderr
    node.run("umount", "/mnt/small")


@pytest.mark.layer3
def test_push_read_and_write_keep_content_owner_and_mode(node: FreshNode, tmp_path: Path) -> None:
    (tmp_path / "folder" / ".git").mkdir(parents=True)
    (tmp_path / "folder" / "a script").write_text("#!/bin/sh\necho ran\n")
    (tmp_path / "folder" / "a script").chmod(0o755)
    node.push(tmp_path / "folder", "/opt/here/it is", owner="spark", exclude=[".git"])
    assert node.run("/opt/here/it is/a script").stdout == "ran\n"
    assert list(node.tree_digest("/opt/here/it is")) == ["/opt/here/it is", "/opt/here/it is/a script"]
    assert node.run("stat", "-c", "%U %a", "/opt/here/it is/a script").stdout == "spark 755\n"
    node.write("/home/spark/note", "kept\n", mode="0600", user="spark")
    assert node.read("/home/spark/note") == "kept\n"


@pytest.mark.layer3
def test_failed_command_shows_its_output(node: FreshNode) -> None:
    with pytest.raises(commands.CommandFailedError, match=r"status 3\.\nwhy it failed"):
        node.run("sh", "-c", "echo why it failed >&2; exit 3")


@pytest.mark.layer3
def test_command_after_its_timeout_is_ended_in_the_node(node: FreshNode) -> None:
    # A busy machine may not even start it in a second.
    for seconds in (1, 10, 100):
        with pytest.raises(commands.CommandTimedOutError) as late:
            node.run("sh", "-c", "echo started; sleep 4321; true", timeout=seconds)
        if str(late.value).endswith("\nstarted"):
            break
    assert str(late.value).endswith("\nstarted"), late.value
    until(lambda: node.run("pgrep", "-f", "^sleep 4321", check=False).stdout == "")


@pytest.mark.layer3
def test_signal_reaches_the_command_in_the_node(node: FreshNode) -> None:
    script = "trap 'echo caught; exit 130' INT; echo ready; while :; do sleep 0.05; done"
    with node.popen("sh", "-c", script, user="spark") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        node.signal(process, signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stdout.read() == "caught\n"


@pytest.mark.layer3
def test_tree_digest_changes_with_every_kind_of_change(node: FreshNode) -> None:
    node.run("sh", "-c", "mkdir -p /srv/t/skip/in; cd /srv/t; echo a >a; echo b >b; ln -s a l; mkfifo f; touch m")
    before = node.tree_digest("/srv/t", "/srv/absent", exclude=["/srv/t/skip"])
    assert sorted(before) == ["/srv/t", *(f"/srv/t/{name}" for name in "abflm")]
    node.run("sh", "-c", "cd /srv/t; echo c >a; chmod 600 b; ln -sfn b l; chown spark f; touch -d @1 m")
    after = node.tree_digest("/srv/t", exclude=["/srv/t/skip"])
    changed = {path for path in before if before[path] != after[path]}
    assert changed == {f"/srv/t/{name}" for name in "abfl"}
    times = node.tree_digest("/srv/t/m", times=True)
    assert times["/srv/t/m"].endswith(" 1000000000")


@pytest.mark.layer3
def test_reboot_and_power_loss_keep_only_the_disk(node: FreshNode) -> None:
    node.run("sh", "-c", "echo stays >/etc/stays; echo goes >/run/goes")
    first = node.run("systemctl", "show", "-P", "UserspaceTimestampMonotonic").stdout
    node.reboot()
    assert node.read("/etc/stays") == "stays\n"
    assert node.run("test", "-e", "/run/goes", check=False).returncode == 1
    assert node.run("systemctl", "show", "-P", "UserspaceTimestampMonotonic").stdout != first
    node.kill()
    assert node.state == "off"
    node.boot()
    assert node.read("/etc/stays") == "stays\n"


@pytest.mark.layer3
def test_second_node_is_fresh_and_has_its_binds(node: FreshNode, tmp_path: Path) -> None:
    node.write("/etc/mark", "of the first\n")
    (tmp_path / "in").write_text("from outside\n")
    binds = [Bind(tmp_path, "/srv/read:only"), Bind(tmp_path, "/srv/writable", read_only=False)]
    with FreshNode(bind=binds) as second:
        assert second.run("test", "-e", "/etc/mark", check=False).returncode == 1
        assert second.read("/srv/read:only/in") == "from outside\n"
        assert second.run("touch", "/srv/read:only/x", check=False).returncode == 1
        second.write("/srv/writable/out", "from inside\n")
        place = second.root.parent
    assert (tmp_path / "out").read_text() == "from inside\n"
    assert not place.exists()


@pytest.fixture
def cable() -> Iterator[tuple[str, str]]:
    names = (f"lab-{secrets.token_hex(3)}", f"lab-{secrets.token_hex(3)}")
    with ExitStack() as stack:
        for name in names:
            commands.run("ip", "netns", "add", name)
            stack.callback(commands.run, "ip", "netns", "del", name)
        ends = [CABLE, "netns", names[0], "type", "veth", "peer", "name", CABLE, "netns", names[1]]
        commands.run("ip", "link", "add", *ends)
        yield names


@pytest.mark.layer2
@pytest.mark.layer3
def test_netplan_apply_on_two_nodes_with_a_cable_configures_both(cable: tuple[str, str]) -> None:
    with FreshNode(netns=cable[0]) as head, FreshNode(netns=cable[1]) as worker:
        for node, address in ((head, "192.0.2.1/24"), (worker, "192.0.2.2/24")):
            rail = f"{{{CABLE}: {{addresses: [{address}], mtu: 9000}}}}"
            plan = f"network: {{version: 2, renderer: networkd, ethernets: {rail}}}\n"
            node.write("/etc/netplan/40-cx7.yaml", plan, mode="0600")
            node.run("netplan", "apply")
        # Not before: an end has no carrier until the other is up.
        for node in (head, worker):
            waited = ("/usr/lib/systemd/systemd-networkd-wait-online", f"--interface={CABLE}", "--timeout=300")
            node.run(*waited)
        assert "mtu 9000" in head.run("ip", "link", "show", CABLE).stdout
        until(lambda: _ping(head, "192.0.2.2", 8972))


CRASH = """
import os, signal
from tests.lab.node import FreshNode
node = FreshNode().__enter__()
# Any other run may remove it as soon as this one is dead.
os.kill(node.leader, 0)
print(node.root.parent, node.leader, node.root.is_mount(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.layer3
def test_node_after_a_crashed_run_removes_what_it_left(node: FreshNode) -> None:
    argv = [sys.executable, "-c", CRASH]
    crashed = subprocess.run(
        argv,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert crashed.returncode == -signal.SIGKILL, crashed.stderr
    place, leader, mounted = crashed.stdout.split()
    assert mounted == "True"
    with FreshNode():
        assert not Path(place).exists()
        assert not _is_alive(leader)
    assert node.run("true").returncode == 0
    assert not [mount / Path(place).name for mount in overlay.cgroup_mounts() if (mount / Path(place).name).exists()]


@pytest.mark.layer3
def test_overlays_made_and_removed_at_once_leave_no_trace(tmp_path: Path) -> None:
    def make_and_remove(number: int) -> Path:
        copy = overlay.Overlay(tmp_path)
        (copy.root / "file").write_text(str(number))
        copy.remove()
        return copy.place

    with ThreadPoolExecutor(8) as threads:
        places = list(threads.map(make_and_remove, range(80)))
    assert len(set(places)) == 80
    assert not [place for place in places if place.exists()]
    assert not list(tmp_path.iterdir())


@pytest.mark.layer3
def test_control_group_is_removed_as_soon_as_its_last_process_has_ended() -> None:
    group = overlay.cgroup_mounts()[0] / f"{overlay.PREFIX}{secrets.token_hex(4)}"
    (group / "inner").mkdir(parents=True)
    with subprocess.Popen(["sleep", "1000"]) as process, ThreadPoolExecutor(1) as thread:
        try:
            (group / "inner/cgroup.procs").write_text(str(process.pid))
            removed = thread.submit(overlay._remove_group, group)
            with pytest.raises(TimeoutError):
                removed.result(0.5)
        finally:
            process.kill()
        removed.result()
    assert not group.exists()


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(2, port_1=True) as fresh:
        yield fresh


def _carrier(node: FleetNode, interface: str = CABLE) -> str:
    return node.read(f"/sys/class/net/{interface}/carrier").strip()


def _ping(node: FreshNode, address: str, size: int = 56) -> bool:
    sent = node.run("ping", "-c", "1", "-W", "1", "-M", "do", "-s", str(size), address, check=False)
    return sent.returncode == 0


@pytest.fixture
def addressed(fleet: Fleet) -> Iterator[Fleet]:
    """The fleet with an address on each half of each node, until it boots again."""
    for number, node in enumerate(fleet.nodes, start=1):
        for half, interface in enumerate(PORT_0):
            node.run("ip", "address", "add", f"192.0.2.{half * 128 + number}/25", "dev", interface)
    yield fleet
    for node in fleet.nodes:
        for interface in PORT_0:
            node.run("ip", "address", "flush", "dev", interface)
    fleet.set_mtu(1500)


@pytest.mark.layer2
@pytest.mark.layer3
def test_ssh_from_the_terminal_reaches_all_nodes(fleet: Fleet) -> None:
    for node in fleet.nodes:
        asked = fleet.ssh(node, "sh", "-c", "hostname; id -un; echo $SSH_CONNECTION; sudo -n id -un")
        name, user, connection, with_sudo = asked.stdout.splitlines()
        assert (name, user, with_sudo) == (node.name, "spark", "root")
        assert connection.split()[::2] == [TERMINAL_ADDRESS, node.address]
    assert len({node.host_key for node in fleet.nodes}) == 2


@pytest.mark.layer2
@pytest.mark.layer3
def test_ssh_admits_users_with_the_key_only(fleet: Fleet) -> None:
    node = fleet.nodes[0]
    asked = fleet.ssh(node, "sh", "-c", "id -un; sudo -n true", user="plain", check=False)
    assert (asked.stdout, "password is required" in asked.stderr) == ("plain\n", True)
    stranger = fleet.terminal.run("ssh", "-o", "StrictHostKeyChecking=no", f"spark@{node.address}", "true", check=False)
    assert "Permission denied" in stranger.stderr


@pytest.mark.layer2
@pytest.mark.layer3
def test_ssh_with_a_changed_host_key_fails(fleet: Fleet) -> None:
    changed, other = fleet.nodes
    fleet.change_host_key(changed)
    refused = fleet.ssh(changed, "true", check=False)
    assert (refused.returncode, "Host key verification failed" in refused.stderr) == (255, True)
    assert fleet.ssh(other, "true").returncode == 0
    fleet.terminal.know(fleet.nodes)
    assert fleet.ssh(changed, "true").returncode == 0


@pytest.mark.layer2
@pytest.mark.layer3
def test_lan_after_netplan_apply_and_reboot_works(fleet: Fleet) -> None:
    node = fleet.nodes[0]
    node.run("netplan", "apply")
    until(lambda: f"default via {ROUTER_ADDRESS} dev {LAN}" in node.run("ip", "route").stdout)
    assert fleet.ssh(node, "true").returncode == 0
    node.reboot()
    until(lambda: f"default via {ROUTER_ADDRESS} dev {LAN}" in node.run("ip", "route").stdout)
    until(lambda: fleet.ssh(node, "true", check=False).returncode == 0)


@pytest.mark.layer2
@pytest.mark.layer3
@pytest.mark.network
def test_nodes_of_a_fleet_reach_the_indexes(fleet: Fleet) -> None:
    fleet.ssh(fleet.nodes[0], "sudo", "apt-get", "update", timeout=300)
    fetch = "python3 -m venv /tmp/venv && /tmp/venv/bin/pip download --quiet --no-deps --dest /tmp/got typer"
    fleet.ssh(fleet.nodes[1], "sh", "-c", fetch, timeout=300)
    assert fleet.nodes[1].run("sh", "-c", "ls /tmp/got").stdout.startswith("typer-")


@pytest.mark.layer2
@pytest.mark.layer3
def test_ping_of_an_unused_address_fails(fleet: Fleet) -> None:
    assert not _ping(fleet.nodes[0], "203.0.113.7")
    assert not _ping(fleet.nodes[0], "192.0.2.2")


@pytest.mark.layer2
@pytest.mark.layer3
def test_cable_carries_packets_up_to_the_smaller_mtu(addressed: Fleet) -> None:
    one, other = addressed.nodes
    until(lambda: _ping(one, "192.0.2.2") and _ping(other, "192.0.2.129"))
    addressed.set_mtu(9000, one)
    assert not _ping(one, "192.0.2.2", 8972)
    addressed.set_mtu(9000, other)
    until(lambda: _ping(one, "192.0.2.2", 8972) and _ping(other, "192.0.2.129", 8972))
    assert not _ping(one, "192.0.2.2", 8973)


@pytest.mark.layer2
@pytest.mark.layer3
def test_pulled_cable_has_no_carrier_at_both_ends_only(addressed: Fleet) -> None:
    one, other = addressed.nodes
    addressed.unplug(one)
    for node in addressed.nodes:
        assert [_carrier(node, interface) for interface in (LAN, *PORT_0)] == ["1", "0", "0"]
    assert addressed.ssh(one, "true").returncode == 0
    addressed.plug(one)
    until(lambda: _ping(one, "192.0.2.2"))
    addressed.unplug(other, LAN)
    assert not _ping(addressed.terminal, other.address)
    addressed.plug(other, LAN)
    until(lambda: _ping(addressed.terminal, other.address))


@pytest.mark.layer2
@pytest.mark.layer3
def test_port_1_has_no_carrier(fleet: Fleet) -> None:
    assert [_carrier(node, interface) for node in fleet.nodes for interface in PORT_1] == ["0"] * 4


@pytest.mark.layer2
@pytest.mark.layer3
def test_node_switched_off_and_on_loses_carrier_and_addresses(fleet: Fleet) -> None:
    one, other = fleet.nodes
    other.run("ip", "address", "add", "192.0.2.2/25", "dev", CABLE)
    fleet.set_mtu(9000)
    other.run("nft", "add", "table", "inet", "lab")
    other.kill()
    assert _carrier(one) == "0"
    other.boot()
    until(lambda: _carrier(one) == "1")
    assert "192.0.2.2" not in other.run("ip", "address").stdout
    assert "mtu 1500" in other.run("ip", "link", "show", CABLE).stdout
    assert other.run("nft", "list", "ruleset").stdout == ""
    fleet.set_mtu(1500)


def _traces(tag: str) -> list[str]:
    return [name for name in commands.run("ip", "netns", "list").stdout.split() if name.startswith(tag)]


@pytest.mark.layer2
@pytest.mark.layer3
def test_fleet_of_three_nodes_uses_a_switch_and_leaves_no_trace() -> None:
    with Fleet(3, internet=False) as three:
        tag, first = three.terminal.plugs.netns.removesuffix("-terminal"), three.nodes[0]
        assert len(_traces(tag)) == 5
        three.unplug(first)
        assert [_carrier(node) for node in three.nodes] == ["0", "1", "1"]
        places = [node.root.parent for node in (three.terminal, *three.nodes)]
        leaders = [str(node.leader) for node in (three.terminal, *three.nodes)]
    assert _traces(tag) == []
    assert not any(map(_is_alive, leaders))
    assert not [place for place in places if place.exists()]


@pytest.mark.layer2
@pytest.mark.layer3
def test_fleet_with_a_node_that_does_not_boot_is_removed(tmp_path: Path) -> None:
    broken = Fleet(2, bind=lambda index: [Bind(tmp_path / "absent", "/srv/x")] if index else [], internet=False)
    with pytest.raises(NodeError, match="spark-2 ended while it booted"), broken:
        pass
    assert _traces(broken.terminal.plugs.netns.removesuffix("-terminal")) == []
    assert not [node.name for node in (broken.terminal, *broken.nodes) if node.root.parent.exists()]


CRASHED_FLEET = """
import os, signal
from tests.lab.cabling import NETNS
from tests.lab.fleet import Fleet
fleet = Fleet(1).__enter__()
tag = fleet.terminal.plugs.netns.removesuffix("-terminal")
# Any other run may remove them as soon as this one is dead.
print(tag, fleet.nodes[0].leader, len([*NETNS.glob(f"{tag}-*")]), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.layer2
@pytest.mark.layer3
def test_cabling_after_a_crashed_fleet_removes_what_it_left() -> None:
    settings = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    argv = [sys.executable, "-c", CRASHED_FLEET]
    crashed = subprocess.run(argv, capture_output=True, text=True, env=settings)
    assert crashed.returncode == -signal.SIGKILL, crashed.stderr
    # The router has ended: capture_output waits until it closes its standard error.
    tag, leader, namespaces = crashed.stdout.split()
    assert namespaces == "3"
    cabling.Cabling(direct=False).remove()
    assert _traces(tag) == []
    with FreshNode():
        assert not _is_alive(leader)


BUILD_TWICE = """
from tests.lab import cache
def build(tree):
    import time; time.sleep(0.5); (tree / "built").write_text("x"); print("built")
print(cache.kept("probe", ["recipe"], build))
"""


def test_cache_kept_by_two_processes_is_built_once(tmp_path: Path) -> None:
    settings = {**os.environ, "PYTHONPATH": str(REPOSITORY), "XDG_CACHE_HOME": str(tmp_path)}
    argv = [sys.executable, "-c", BUILD_TWICE]
    both = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=settings) for _ in range(2)]
    output = [process.communicate(timeout=60)[0].splitlines() for process in both]
    assert sorted(map(len, output)) == [1, 2]
    assert output[0][-1] == output[1][-1]


OWN_NAME = """
from tests.lab import cache
print(cache.own_name("probe"), cache.own_name("probe"), flush=True)
input()
"""


def test_own_name_of_two_processes_differs_until_one_has_ended(tmp_path: Path) -> None:
    settings = {**os.environ, "PYTHONPATH": str(REPOSITORY), "XDG_CACHE_HOME": str(tmp_path)}

    def started(stack: ExitStack) -> tuple[subprocess.Popen[str], str]:
        argv = [sys.executable, "-c", OWN_NAME]
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=settings)
        stack.enter_context(process)
        stack.callback(process.kill)
        assert process.stdout is not None
        return process, process.stdout.readline()

    with ExitStack() as stack:
        first, name = started(stack)
        assert (name, started(stack)[1]) == ("probe probe\n", "probe-2 probe-2\n")
        first.communicate("\n")
        assert started(stack)[1] == "probe probe\n"


TEMPORARY = """
import os, signal, sys
from tests.lab import cache
with cache.temporary("probe") as made:
    (made / "file").write_text("x")
    print(made, flush=True)
    input()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_temporary_folder_of_a_killed_process_is_removed_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    argv = [sys.executable, "-c", TEMPORARY]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=settings) as process:
        assert process.stdout is not None
        left = Path(process.stdout.readline().strip())
        with cache.temporary("probe") as mine:
            assert left.is_dir() and mine.is_dir()
        assert (left / "file").is_file() and not mine.exists()
        process.communicate("\n")
    assert process.returncode == -signal.SIGKILL and left.is_dir()
    with cache.temporary("probe") as mine:
        assert [path for path in cache.folder().iterdir() if path.is_dir()] == [mine]


def test_cache_kept_removes_failed_and_old_trees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fail(tree: Path) -> None:
        (tree / "half").write_text("done")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cache.kept("probe", ["bad"], fail)
    (cache.folder() / "probe-0123456789abcdef").mkdir()
    current = cache.kept("probe", ["good"], lambda _: None)
    assert [path for path in cache.folder().iterdir() if path.is_dir()] == [current]


@pytest.mark.parametrize(
    ("settings", "outcome"),
    [
        ({}, pytest.skip.Exception),
        ({"CI": "true"}, pytest.fail.Exception),
        ({"SPARKINSTALL_ALL_LAYERS": "1"}, pytest.fail.Exception),
    ],
)
def test_require_of_an_unavailable_layer_fails_in_ci_and_skips_elsewhere(
    settings: dict[str, str], outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CI", "SPARKINSTALL_ALL_LAYERS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(layers.LAYERS, 9, lambda: "no such thing")
    monkeypatch.setattr(layers, "_skipped", {})
    with pytest.raises(outcome, match="layer 9 cannot run here: no such thing"):
        layers.require(9)


SKIPPING = """
import pytest
@pytest.mark.skipif(True, reason="no such program")
def test_marked(): ...
def test_asked(): pytest.skip("no such index")
@pytest.mark.xfail(strict=True, reason="known")
def test_known(): assert False
def test_good(): ...
"""


@pytest.mark.parametrize(
    ("setting", "counts"), [("", "1 passed, 2 skipped, 1 xfailed"), ("true", "1 failed, 1 passed, 1 xfailed, 1 error")]
)
def test_skipped_tests_fail_in_ci(setting: str, counts: str, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(SKIPPING)
    settings = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CI": setting, "SPARKINSTALL_ALL_LAYERS": ""}
    argv = [sys.executable, "-m", "pytest", "-p", "tests.lab.layers", "-p", "no:cacheprovider", "-rf", str(tmp_path)]
    output = subprocess.run(argv, capture_output=True, text=True, env=settings, cwd=tmp_path).stdout
    assert counts in output
    assert ("no such index; and CI must run this" in output) == bool(setting)


@pytest.fixture(scope="module")
def spark() -> Iterator[arm64.Arm64]:
    with arm64.chroot() as tree:
        yield tree


@pytest.mark.layer6
def test_arm64_tree_runs_as_aarch64(spark: arm64.Arm64) -> None:
    output = spark.run("python3", "-c", "import platform; print(platform.machine())")
    assert output.stdout == "aarch64\n"


@pytest.mark.layer6
@pytest.mark.network
def test_arm64_tree_runs_installed_packages(spark: arm64.Arm64) -> None:
    spark.install("typer", "pyyaml")
    program = "import platform, typer, yaml\ntyper.run(lambda: print(platform.machine(), yaml.__with_libyaml__))"
    assert spark.run("python3", "-c", program).stdout == "aarch64 True\n"


@pytest.mark.layer6
def test_arm64_command_after_its_timeout_is_ended_with_its_children(spark: arm64.Arm64) -> None:
    seconds = 100_000 + os.getpid()
    with pytest.raises(commands.CommandTimedOutError):
        spark.run("sh", "-c", f"sleep {seconds}; true", timeout=1)
    until(lambda: commands.run("pgrep", "-f", f"sleep {seconds}", check=False).stdout == "")
