"""From a command line to a node: settings in layers, the stack, the state on the node."""

import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import replace

from sparkinstall import config as configuration
from sparkinstall.assets import user_cache
from sparkinstall.cli.options import Target
from sparkinstall.config import Config, Layer
from sparkinstall.config.cluster import require_sound
from sparkinstall.errors import BadConfig, BadUsage, NeedsRoot
from sparkinstall.journal.state_dir import StateFolder
from sparkinstall.node import Node
from sparkinstall.system.local import LocalSystem

if TYPE_CHECKING:
    from sparkinstall.core.engine import StepReport
    from sparkinstall.steps import Step

_RECORDED = "the last `all` or `run`"


class Session(Struct, frozen=True):
    """Everything a verb works with. `sources` says where each setting came from."""

    node: Node
    system: LocalSystem
    state: StateFolder
    sources: dict[str, str]
    options: dict[str, Any]

    @property
    def where(self) -> str:
        """The node in words."""
        place = f"the rehearsal in {self.system.root}" if self.node.rehearsal else "this node"
        return f"{place} (stack {self.node.stack.name}, {self.node.platform})"

    @property
    def root_option(self) -> str:
        """What a further command line needs to mean the same node."""
        return f" --root {self.system.root}" if self.node.rehearsal else ""


def open_session(asked: Target) -> Session:
    """Resolve what was asked.

    Raises:
        BadUsage, BadConfig: it cannot be used as it is; nothing was touched.
    """
    system = LocalSystem(_root(asked.root))
    state = StateFolder(system)
    options = asked.after(state.options())
    try:
        config, sources = configuration.build(_layers(asked, state.options(), options))
        node = _node(_settled(config, sources), system, options, asked)
    except BadConfig as problem:
        if state.options():
            problem.hint += f" (options of former runs are remembered in {state.home}/options.json)"
        raise
    _check_places(node, system)
    return Session(node, system, state, sources, options)


def _root(root: Path | None) -> str:
    if root is None:
        return "/"
    full = root.expanduser().absolute()
    if full.resolve() == Path("/"):
        raise BadUsage("--root / is this machine itself", hint="leave --root out to set it up, or name a folder")
    if full.exists() and not full.is_dir():
        raise BadUsage(f"--root {root} is not a folder", hint="name a folder; it is made where there is none")
    if not full.parent.is_dir():
        raise BadUsage(
            f"--root {root}: there is no folder {full.parent}", hint=f"make it first: mkdir -p {full.parent}"
        )
    return str(full.parent.resolve() / full.name)


def _layers(asked: Target, recorded: dict[str, Any], options: dict[str, Any]) -> list[Layer]:
    files = [configuration.read_layer(path) for path in _config_files(options.get("config"))]
    return [*files, Layer(_RECORDED, recorded.get("settings", {})), Layer("the command line", asked.values())]


def _config_files(named: str | None) -> list[Path]:
    if named:
        return [Path(named)]
    found = [Path(each).expanduser() for each in configuration.DEFAULT_FILES]
    return [each for each in found if each.exists()]


def _settled(config: Config, sources: dict[str, str]) -> Config:
    """`config` with the addresses of a cluster that follow from one another.

    Raises:
        BadConfig: they cannot be a cluster's.
    """
    cluster = config.cluster
    if cluster.role == "worker" and cluster.address and sources["cluster.workers"] == "default":
        # Of two nodes only one is a worker: its own address is all there is to know.
        cluster = replace(cluster, workers=(cluster.address,))
        config = replace(config, cluster=cluster)
    if cluster.role != "single":
        require_sound(config)
    return config


def _node(config: Config, system: LocalSystem, options: dict[str, Any], asked: Target) -> Node:
    from sparkinstall import stacks

    try:
        stack = stacks.load(config.stack)
    except stacks.StackError as error:
        raise BadConfig(str(error)) from error
    machine = platform.machine()
    wanted = options.get("platform") or machine
    if not system.rehearsal and (options.get("platform") or options.get("full") is not None):
        raise BadUsage("--platform and --full are for a rehearsal", hint="add `--root ./node`")
    if wanted not in stack.platforms:
        known = ", ".join(stack.platforms)
        raise BadUsage(f"stack {stack.name} has no wheels for {wanted}", hint=f"it has them for: {known}")
    if config.nccl.source == "git" and config.nccl.version not in (None, stack.nccl.version):
        raise BadConfig(
            f"`nccl.version` is {config.nccl.version}, but stack {stack.name} pins the repository at {stack.nccl.tag}",
            hint="name a tarball or a folder of that version with `nccl.source`, or leave `nccl.version` out",
        )
    return Node(
        config=config,
        stack=stack,
        platform=wanted,
        machine=machine,
        rehearsal=system.rehearsal,
        full=bool(options.get("full")),
        home=str(Path.home()),
        cache=user_cache(),
        confirm_later=asked.confirm_later,
        token_file=str(asked.token_file or ""),
    )


def looked_at(session: Session, steps: "Sequence[Step]") -> "list[StepReport]":
    """How everything stands. What only root can tell is asked again once the person at the terminal gave a password."""
    from sparkinstall.core import engine

    reports = engine.plan(steps, session.node, session.system)
    if sys.stdin.isatty() and any(isinstance(report.problem, NeedsRoot) for report in reports):
        session.system.ask_for_sudo()
        return engine.plan(steps, session.node, session.system)
    return reports


def _check_places(node: Node, system: LocalSystem) -> None:
    complaint = configuration.safe_path(system.real(node.prefix))
    if complaint:
        raise BadUsage(f"{system.real(node.prefix)!a} {complaint}", hint="choose another folder for --root")


def open_state(asked: Target) -> StateFolder:
    """The state of the node alone: for what must work whatever the settings say."""
    return StateFolder(LocalSystem(_root(asked.root)))
