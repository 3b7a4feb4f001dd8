"""Turn a command line into a node: settings in layers, the stack, the state on the node."""

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from msgspec import Struct, field, to_builtins
from msgspec.structs import replace

from sparkinstall import config as configuration
from sparkinstall import given, stacks
from sparkinstall.assets import user_cache
from sparkinstall.config import Config, Layer
from sparkinstall.config.cluster import require_sound
from sparkinstall.core import engine
from sparkinstall.core.engine import StepReport
from sparkinstall.errors import BadConfig, BadUsage, NeedsRoot
from sparkinstall.journal.state_dir import Served, StateFolder
from sparkinstall.node import Node
from sparkinstall.recipes import serve_options
from sparkinstall.resources import ray_token
from sparkinstall.steps import Step
from sparkinstall.system.local import LocalSystem

_RECORDED = "the last `all` or `run`"
_MODEL = "serving.model"
IDENTITY = (_MODEL, "serving.revision", "serving.recipe")
"""The settings that say what is served: `serve` decides them."""
_OF_A_MODEL = ("serving.arguments", "serving.env", "serving.memory", "serving.max_model_len")


class Target(Struct, frozen=True):
    """The node that a command line selects. `None`: not given, so the last `all` or the config decides.

    `role`: options of `multi-node` as settings. `served`: what `serve` names. `confirm_later`, `token_file` and
    `bundle` apply to this run only.
    """

    root: Path | None = None
    config: Path | None = None
    stack: str | None = None
    settings: tuple[str, ...] = ()
    platform: str | None = None
    full: bool | None = None
    role: Mapping[str, Any] = field(default_factory=dict)
    served: Served | None = None
    confirm_later: bool = False
    token_file: Path | None = None
    bundle: Path | None = None

    @property
    def root_option(self) -> str:
        """The `--root` as given, for further command lines for the same node."""
        return f" --root {self.root}" if self.root else ""

    def values(self) -> dict[str, Any]:
        """Return the given settings by name; paths are absolute."""
        values = dict(configuration.parse_assignment(each) for each in self.settings)
        if self.stack is not None:
            values["stack"] = self.stack
        values |= {name: value for name, value in self.role.items() if value is not None}
        return configuration.anchored(values, "")

    def _config_file(self) -> str | None:
        if self.config is None:
            return None
        path = given.absolute(self.config, "--config", BadConfig)
        # Of a pipe only this name can be read.
        return os.path.realpath(path) if given.lasts(str(path)) else str(path)

    def after(self, recorded: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options that later verbs continue with: these, over those of former runs."""
        values, former = self.values(), dict(recorded.get("settings", {}))
        kept = {name: value for name, value in recorded.items() if name != "served" or _MODEL not in values}
        served = None
        if self.served:
            former = {name: value for name, value in former.items() if name not in IDENTITY}
            served = replace(self.served, own={name: value for name, value in values.items() if name in _OF_A_MODEL})
            values = {name: value for name, value in values.items() if name not in _OF_A_MODEL}
        said = {
            "config": self._config_file(),
            "platform": self.platform,
            "full": self.full,
            "served": to_builtins(served) if served else None,
        }
        settings = {**former, **values}
        kept.pop("settings", None)
        after = {**kept, **{name: value for name, value in said.items() if value is not None}}
        return {**after, "settings": settings} if settings else after


class Setting(Struct, frozen=True):
    """The value of a setting, and its origin."""

    value: Any
    source: str


class Session(Struct, frozen=True):
    """One node for a use case. `sources`: the origin of each setting."""

    node: Node
    system: LocalSystem
    state: StateFolder
    sources: dict[str, str]
    options: dict[str, Any]

    @property
    def where(self) -> str:
        """Name the node in words."""
        place = f"the rehearsal in {self.system.root}" if self.node.rehearsal else "this node"
        return f"{place} (stack {self.node.stack.name}, {self.node.platform})"

    @property
    def root_option(self) -> str:
        """Return the `--root` that a further command line needs to mean the same node."""
        return f" --root {self.system.root}" if self.node.rehearsal else ""

    def settings(self) -> dict[str, Setting]:
        """Return each setting by its dotted name."""
        return {
            each.name: Setting(reduce(getattr, each.name.split("."), self.node.config), self.sources[each.name])
            for each in configuration.settings()
        }


def open_session(target: Target) -> Session:
    """Resolve the target.

    Raises:
        BadUsage, BadConfig: it is invalid; nothing was changed.
    """
    system = LocalSystem(_root(target.root))
    state = StateFolder(system)
    options = target.after(state.options())
    try:
        layers, served = _layers(target, options), options.get("served")
        base = [Layer(f"`serve {served['name']}`", served["settings"])] if served else []
        config, sources = configuration.build([*base, *layers])
        for layer in base:
            config = _with_lists_of(config, sources, layer)
        node = _node(_settled(config, sources), system, options, target)
    except BadConfig as problem:
        if state.options():
            remembered = f"options of earlier runs are stored in {state.home}/options.json"
            problem.hint = f"{problem.hint} ({remembered})" if problem.hint else remembered
        raise
    if complaint := configuration.safe_path(system.real(node.prefix)):
        raise BadUsage(f"{system.real(node.prefix)!a} {complaint}", hint="choose another folder for --root")
    return Session(node, system, state, sources, options)


def _root(root: Path | None) -> str:
    if root is None:
        return "/"
    full = given.absolute(root, "--root")
    real = os.path.realpath(full)
    if real == "/":
        raise BadUsage("--root / is this machine itself", hint="omit --root to set it up, or name a folder")
    if full.is_symlink() and not full.exists():
        raise BadUsage(f"--root {root} is a link to {real}, which does not exist", hint=f"create it: mkdir -p {real}")
    if full.exists() and not full.is_dir():
        raise BadUsage(f"--root {root} is not a folder", hint="name a folder; a missing one is created")
    if not full.parent.is_dir():
        raise BadUsage(
            f"--root {root}: there is no folder {full.parent}", hint=f"create it first: mkdir -p {full.parent}"
        )
    return real


def _layers(target: Target, options: dict[str, Any]) -> list[Layer]:
    files = [configuration.read_layer(path) for path in config_files(options.get("config"))]
    served = options.get("served")
    own = [Layer(f"`serve {served['name']} --set`", served.get("own", {}))] if served else []
    given = Layer("the command line", target.values())
    return [*files, Layer(_RECORDED, options.get("settings", {})), *own, given]


def _with_lists_of(config: Config, sources: dict[str, str], served: Layer) -> Config:
    """Put the user's arguments and variables of vLLM after those of what is served, which they replace one by one."""
    serving, values = config.serving, served.values
    if sources["serving.arguments"] != served.source:
        words = (*values.get("serving.arguments", ()), *serving.arguments)
        stray, named = serve_options.options(words)
        one_of_each = [word for option in serve_options.last_of_each(named) for word in option]
        serving = replace(serving, arguments=words if stray else tuple(one_of_each))
    if sources["serving.env"] != served.source:
        pairs = (each.partition("=") for each in (*values.get("serving.env", ()), *serving.env))
        last = {name: value for name, _, value in pairs}
        serving = replace(serving, env=tuple(f"{name}={value}" for name, value in last.items()))
    return replace(config, serving=serving)


def config_files(named: Path | str | None) -> list[Path]:
    """Return the config files to read: the named one, or the default ones that exist."""
    if named:
        return [given.absolute(named, "--config", BadConfig)]
    found = [given.absolute(each, "the config", BadConfig) for each in configuration.DEFAULT_FILES]
    return [each for each in found if os.path.lexists(each)]


def _settled(config: Config, sources: dict[str, str]) -> Config:
    """Complete the addresses of a cluster that follow from others.

    Raises:
        BadConfig: they are inconsistent.
    """
    cluster = config.cluster
    if cluster.role == "worker" and cluster.address and sources["cluster.workers"] == "default":
        # With a single worker, its own address is enough.
        cluster = replace(cluster, workers=(cluster.address,))
        config = replace(config, cluster=cluster)
    if cluster.role != "single":
        require_sound(config)
    return config


def _node(config: Config, system: LocalSystem, options: dict[str, Any], target: Target) -> Node:
    stack = stacks.load(config.stack)
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
            hint="set `nccl.source` to a tarball or a folder of that version, or omit `nccl.version`",
        )
    return Node(
        config=config,
        stack=stack,
        platform=wanted,
        machine=machine,
        rehearsal=system.rehearsal,
        full=bool(options.get("full")),
        home=str(given.home()),
        cache=user_cache(),
        confirm_later=target.confirm_later,
        token_file=_token_file(target.token_file),
        bundle=str(target.bundle or ""),
    )


def described(target: Target) -> Node:
    """Return a node as the target describes it, which may be anywhere: nothing of this machine's state is looked at.

    Raises:
        BadUsage, BadConfig: it is invalid.
    """
    named = [configuration.read_layer(path) for path in config_files(target.config)] if target.config else []
    config, _ = configuration.build([*named, Layer("the command line", target.values())])
    return _node(config, LocalSystem(str(user_cache())), {"platform": target.platform, "full": True}, target)


def _token_file(named: Path | None) -> str:
    """Return the token's file; what it contains is checked before anything is changed."""
    if named is None:
        return ""
    file = "-" if str(named) == "-" else str(given.absolute(named, "--token-file"))
    ray_token.given(file)
    return file


def looked_at(session: Session, steps: Sequence[Step]) -> list[StepReport]:
    """Check every resource of `steps`; on a terminal, ask for the password of sudo if a check needs root."""
    reports = engine.plan(steps, session.node, session.system)
    if sys.stdin.isatty() and any(isinstance(report.problem, NeedsRoot) for report in reports):
        session.system.ask_for_sudo()
        return engine.plan(steps, session.node, session.system)
    return reports


def open_state(target: Target) -> StateFolder:
    """Open only the state of the node, for verbs that must work whatever the settings are."""
    return StateFolder(LocalSystem(_root(target.root)))
