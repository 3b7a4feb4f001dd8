"""Several fresh nodes, like Sparks on a desk, and the terminal from which a user sets them up.

A LAN joins all of them (`enP7s7`, configured by netplan, with a router to the Python and Debian indexes of this
machine). Port 0 of the QSFP card joins the nodes: two by a cable, more by a switch. Every machine boots with systemd as
PID 1 in its own network namespace; the terminal's user `spark` may log in to every node with ssh.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.lab import cabling, commands, machine, outside, rootfs
from tests.lab.cabling import LAN, PORT_0, PORT_1, Cabling, Plugs
from tests.lab.commands import Completed, Process
from tests.lab.node import Bind, FreshNode, NodeError

NETWORK = "198.51.100"
TERMINAL_ADDRESS = f"{NETWORK}.1"
ROUTER_ADDRESS = f"{NETWORK}.254"
# Routes that make every address local to the router; used only for the web's two ports.
ROUTER_TABLE = "100"
HOST_KEY = "ssh_host_ed25519_key"
LAN_SECONDS = 180.0

# A key other than the known one ends the session without a question.
SSH_CONFIG = "Host *\n  User spark\n  StrictHostKeyChecking yes\n"


class FleetNode(FreshNode):
    """A node with plugs: its LAN address, its host key, and the users who may log in. `router`: "" if it has none."""

    def __init__(
        self,
        wires: Cabling,
        plugs: Plugs,
        name: str,
        address: str,
        keys: Path,
        bind: Sequence[Bind],
        router: str = ROUTER_ADDRESS,
    ) -> None:
        super().__init__(netns=plugs.netns, bind=bind, hostname=name)
        self._wires = wires
        self.plugs = plugs
        self.address = address
        self._keys = keys
        self._router = router

    @property
    def host_key(self) -> str:
        """Its public host key: kind and key, as in known_hosts."""
        return " ".join((self.root / f"etc/ssh/{HOST_KEY}.pub").read_text().split()[:2])

    def write_files(self) -> None:
        """Write its host key, its LAN, and the variables with which commands over ssh find this machine's indexes."""
        etc = self.root / "etc"
        for old in (etc / "ssh").glob("ssh_host_*"):
            old.unlink()
        shutil.copy(self._keys / self._name_of_key, etc / "ssh" / HOST_KEY)
        shutil.copy(self._keys / f"{self._name_of_key}.pub", etc / "ssh" / f"{HOST_KEY}.pub")
        plan = etc / "netplan/01-lan.yaml"
        plan.write_text(_lan_plan(self.address, self._router))
        plan.chmod(0o600)
        (etc / "resolv.conf").write_text(f"nameserver {self._router}\n" if self._router else "")
        settings = machine.environment()
        (etc / "environment").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        self._write_keys()

    def boot(self) -> None:
        """Power on with new ends of the wires, and also wait for the LAN."""
        started = time.monotonic()
        self._wires.power_on(self.plugs)
        super().boot()
        self._wait_for_lan(time.monotonic() + LAN_SECONDS)
        self.boot_seconds = time.monotonic() - started

    def kill(self) -> None:
        """Pull the power plug: the wires are dead until `boot`."""
        super().kill()
        self._wires.power_off(self.plugs)

    @property
    def _name_of_key(self) -> str:
        return f"host-{self.plugs.number}"

    def _write_keys(self) -> None:
        for user in ("spark", "plain"):
            mine = _ssh_folder(self.root, user)
            shutil.copy(self._keys / "user.pub", mine / "authorized_keys")
            _own(mine)

    def _wait_for_lan(self, deadline: float) -> None:
        while f" {self.address}/" not in self.run("ip", "-4", "-oneline", "address", "show", LAN).stdout:
            if time.monotonic() > deadline:
                raise NodeError(self._with_console(f"{self.name} has no address on its LAN"))
            time.sleep(0.05)


class Terminal(FleetNode):
    """The user's machine: no Spark, no cable, only the LAN and an ssh key."""

    def know(self, nodes: Sequence[FleetNode]) -> None:
        """Give the user an alias for each node, and its host key."""
        hosts = "".join(f"Host {node.name}\n  HostName {node.address}\n" for node in nodes)
        known = "".join(f"{node.name},{node.address} {node.host_key}\n" for node in nodes)
        self.write("/home/spark/.ssh/config", hosts + SSH_CONFIG, mode="0600", user="spark")
        self.write("/home/spark/.ssh/known_hosts", known, mode="0600", user="spark")

    def _write_keys(self) -> None:
        mine = _ssh_folder(self.root, "spark")
        shutil.copy(self._keys / "user", mine / "id_ed25519")
        shutil.copy(self._keys / "user.pub", mine / "id_ed25519.pub")
        _own(mine)


class Fleet:
    """`count` nodes (`spark-1`, `spark-2`, ...) and the terminal, as a context manager. They boot in parallel.

    `bind`: the binds of node 0, 1 and so on; `terminal_bind`: those of the terminal. `port_1`: the nodes also have the
    card's other port, without a cable. `internet`: the router leads to this machine's indexes;
    without it there is none, and the machines see only each other.
    """

    def __init__(
        self,
        count: int,
        *,
        bind: Callable[[int], Sequence[Bind]] = lambda _: (),
        terminal_bind: Sequence[Bind] = (),
        port_1: bool = False,
        internet: bool = True,
    ) -> None:
        self._count = count
        self._bind = bind
        self._terminal_bind = terminal_bind
        self._interfaces = (LAN, *PORT_0, *(PORT_1 if port_1 else ()))
        self._internet = internet
        self._stack = ExitStack()
        self.boot_seconds = 0.0

    def __enter__(self) -> Self:
        started = time.monotonic()
        rootfs.trixie()
        with ExitStack() as stack:
            self._wires = Cabling(direct=self._count == 2)
            stack.callback(self._wires.remove)
            keys = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-keys-")))
            self._add_machines(keys)
            if self._internet:
                stack.enter_context(_router(self._wires.switch))
            stack.enter_context(_booted([self.terminal, *self.nodes]))
            self.terminal.know(self.nodes)
            self._stack = stack.pop_all()
        self.boot_seconds = time.monotonic() - started
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def on_terminal(self, *argv: str, **options: Any) -> Completed:
        """Run a command at the terminal, as its user; options as in `FreshNode.run`."""
        return self.terminal.run(*argv, **{"user": "spark", **options})

    def start_on_terminal(self, *argv: str, **options: Any) -> Process:
        """Start a command there; end it with `terminal.signal`."""
        return self.terminal.popen(*argv, **{"user": "spark", **options})

    def ssh(self, node: FleetNode, *argv: str, user: str = "spark", **options: Any) -> Completed:
        """Run a command on a node by ssh from the terminal."""
        return self.on_terminal("ssh", "-o", "BatchMode=yes", f"{user}@{node.name}", shlex.join(argv), **options)

    def unplug(self, node: FleetNode, *interfaces: str) -> None:
        """Pull the QSFP cable from a node, or only these interfaces' wires: no carrier.

        With two nodes on a cable, the other one has no carrier either.
        """
        self._wires.pull(node.plugs, interfaces or PORT_0)

    def plug(self, node: FleetNode, *interfaces: str) -> None:
        """Insert the cable again."""
        self._wires.insert(node.plugs, interfaces or PORT_0)

    def set_mtu(self, mtu: int, *nodes: FleetNode, interfaces: Sequence[str] = PORT_0) -> None:
        """Set the MTU of the QSFP interfaces until the next boot, on these nodes or on all."""
        for node in nodes or self.nodes:
            for interface in interfaces:
                cabling.ip(node.plugs.netns, "link", "set", interface, "mtu", str(mtu))

    def change_host_key(self, node: FleetNode) -> None:
        """Give a node a host key that the terminal does not know, as after a new installation."""
        key = f"/etc/ssh/{HOST_KEY}"
        node.run("rm", key, f"{key}.pub")
        node.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
        node.run("systemctl", "restart", "ssh")

    def _add_machines(self, keys: Path) -> None:
        plugs = self._wires.add("terminal", (LAN,))
        _make_key(keys / "user")
        _make_key(keys / f"host-{plugs.number}")
        bind = self._terminal_bind
        self.terminal = Terminal(self._wires, plugs, "terminal", TERMINAL_ADDRESS, keys, bind, self._router)
        self.nodes = [self._node(index, keys) for index in range(self._count)]

    def _node(self, index: int, keys: Path) -> FleetNode:
        name = f"spark-{index + 1}"
        plugs = self._wires.add(name, self._interfaces)
        _make_key(keys / f"host-{plugs.number}")
        address, bind = f"{NETWORK}.{11 + index}", self._bind(index)
        return FleetNode(self._wires, plugs, name, address, keys, bind, self._router)

    @property
    def _router(self) -> str:
        return ROUTER_ADDRESS if self._internet else ""


@contextmanager
def _booted(nodes: Sequence[FleetNode]) -> Iterator[None]:
    """Boot all of them in parallel; if one fails, the others end too."""
    with ThreadPoolExecutor(len(nodes)) as pool:
        entered: list[Future[FreshNode]] = [pool.submit(node.__enter__) for node in nodes]
        try:
            for each in entered:
                each.result()
            yield
        finally:
            ended = [pool.submit(_end, node, each) for node, each in zip(nodes, entered, strict=True)]
    for each_end in ended:
        each_end.result()


def _end(node: FleetNode, entered: Future[FreshNode]) -> None:
    if entered.exception() is None:
        node.__exit__(None, None, None)


@contextmanager
def _router(netns: str) -> Iterator[None]:
    """The LAN's router (tests.lab.outside), in the namespace of the LAN's switch."""
    cabling.ip(netns, "address", "add", f"{ROUTER_ADDRESS}/24", "dev", "lan")
    cabling.ip(netns, "route", "add", "local", "default", "dev", "lo", "table", ROUTER_TABLE)
    for port in outside.WEB_PORTS:
        only = ("iif", "lan", "ipproto", "tcp", "dport", str(port))
        cabling.ip(netns, "rule", "add", *only, "lookup", ROUTER_TABLE)
    program = [sys.executable, "-I", outside.__file__, ROUTER_ADDRESS, str(os.getpid())]
    argv = ["nsenter", f"--net=/run/netns/{netns}", *program]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True, start_new_session=True) as process:
        try:
            if process.stdout is None or process.stdout.readline() != "ready\n":
                raise NodeError("the router of the nodes' LAN did not start; its output is above")
            yield
        finally:
            process.kill()


def _make_key(path: Path) -> None:
    commands.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", path.name, "-f", str(path))


def _lan_plan(address: str, router: str) -> str:
    gateway = f", routes: [{{to: default, via: {router}}}]" if router else ""
    lan = f"{LAN}: {{addresses: [{address}/24]{gateway}}}"
    return f"network: {{version: 2, renderer: networkd, ethernets: {{{lan}}}}}\n"


def _ssh_folder(root: Path, user: str) -> Path:
    folder = root / "home" / user / ".ssh"
    folder.mkdir(mode=0o700)
    return folder


def _own(folder: Path) -> None:
    """Make the owner of the home the owner of the folder and its files, and the only user who can read them."""
    owner = folder.parent.stat()
    for path in (folder, *folder.iterdir()):
        os.chown(path, owner.st_uid, owner.st_gid)
    for path in folder.iterdir():
        path.chmod(0o600)
