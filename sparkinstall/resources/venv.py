"""The Python environment: one venv, installed by uv from a lock with hashes."""

import hashlib
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlsplit

from msgspec import Struct
from msgspec.structs import replace

from sparkinstall import patches, stacks
from sparkinstall.assets import asset
from sparkinstall.downloads import NotDownloaded
from sparkinstall.errors import Blocked, CommandFailed, StateDamaged
from sparkinstall.facts import wheel_files, wheels
from sparkinstall.facts.decisions import VenvStamp, as_text, installed_stack, recorded
from sparkinstall.node import Node, site_packages
from sparkinstall.resources import Conflict, Drift, Ok, State, Unknown, not_a_folder
from sparkinstall.resources.fp8 import PatchedFile
from sparkinstall.services import env_units
from sparkinstall.stacks import Pin, StackError, canonical, parse_lock, render_lock
from sparkinstall.system import Reader, System
from sparkinstall.wheel_index import for_platform, run_uv, uv, uv_env, uv_platform
from sparkinstall.wheelhouse import Wheelhouse

_IMPORTS = "import torch, triton, ray, vllm"
_IMPORT_SECONDS = 900


class RecordedLock(Struct, frozen=True):
    """The lock completed on the node at the first install, if the shipped one lacks hashes.

    From then on, other versions or hashes are an error.
    """

    node: Node

    @property
    def key(self) -> str:
        return f"lock:{self.node.lock_record}"

    def check(self, on: Reader) -> State:
        if lock_of(self.node, on) is not None:
            return Ok("hashes recorded at the first install and enforced since")
        names = self.node.wheels.unhashed
        what = f"the hashes of {', '.join(names)}" if names else f"the versions and hashes of {self.node.stack.name}"
        return Drift(f"record {what}, unknown until the first install")

    def apply(self, on: System) -> None:
        # A record is never replaced, not even by --force: that is what pinning means.
        if on.entry(self.node.lock_record):
            return
        self.node.cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.node.cache, prefix="lock-") as scratch:
            wanted, made = Path(scratch, "wanted.in"), Path(scratch, "made.lock")
            here = self._unhashed_wheels(on)
            text = self.node.wheels.open_text()
            for url, path in here.items():
                text = text.replace(url, path.as_uri())
            wanted.write_text(text)
            _uv(on, self.node, [uv(), "pip", "compile", *self._options(), "-o", str(made), str(wanted)])
            text = made.read_text()
            for url, path in here.items():
                text = text.replace(path.as_uri(), url)
        on.write(self.node.lock_record, self.node.wheels.close(text).encode())

    def _unhashed_wheels(self, on: System) -> dict[str, Path]:
        """Return the wheels that must be downloaded to know their hashes, by their URLs."""
        urls = [pin.url for pin in self.node.wheels.wheels if pin.url and not pin.hashes]
        try:
            return {url: wheelhouse(self.node).bring(on, url) for url in urls}
        except CommandFailed as failure:
            raise explain_failed_install(failure, self.node) from failure

    def _options(self) -> list[str]:
        node = self.node
        options = ["--generate-hashes", "--no-header", "--no-annotate", "--no-emit-index-url", "--only-binary=:all:"]
        options += ["--no-python-downloads", "--color", "never", "--python-version", node.stack.python]
        if node.stack.as_of and not node.wheels.lock:
            # Pinned versions may be newer than this date; all others may not.
            options += ["--exclude-newer", node.stack.as_of]
            options += [f"--exclude-newer-package={pin.name}=false" for pin in node.stack.requirements]
        return [*options, "--python-platform", uv_platform(node.platform)]


class PythonEnvironment(Struct, frozen=True):
    """The venv holds the pins of the lock and passes the wheel gate."""

    node: Node
    part: ClassVar[str] = "all"

    @property
    def key(self) -> str:
        return f"venv:{self.node.venv}"

    def check(self, on: Reader) -> State:
        lock = lock_of(self.node, on)
        if lock is None:
            return Unknown("the hashes are recorded")
        if _link_name(self.node, on) is None and (taken := not_a_folder(on, self.node.venv)):
            return taken
        pins = self._wanted(lock)
        stamp = recorded(on, self.node.venv_stamp, VenvStamp)
        there = installed(self.node, on)
        if not Path(on.real(self.node.python)).exists():
            there = {}
        made_from = stamp and replace(stamp, place="")
        if made_from == self._stamp(lock) and all(there.get(pin.name) == pin.version for pin in pins):
            return Ok(self._note(lock))
        after = {pin.name: pin.version for pin in pins}
        return Drift(self._summary(pins) + self._switch(on), _listing(there), _listing(after))

    def _switch(self, on: Reader) -> str:
        """Say what happens to an environment of another stack, and what is restarted."""
        there = installed_stack(on, self.node.venv_stamp)
        if there in ("", self.node.stack.name):
            return ""
        units = [each for each in env_units(self.node) if on.entry(self.node.started_record(each))]
        restart = f", and restart {', '.join(units)}" if units else ""
        former = "keep" if self.node.config.environment.keep_old else "then remove"
        return f" beside stack {there}; once they are proven, switch to them{restart}; {former} the former environment"

    def _wanted(self, lock: Sequence[Pin]) -> list[Pin]:
        return list(lock)

    def _summary(self, pins: Sequence[Pin]) -> str:
        stack = self.node.stack
        return f"install the {len(pins)} packages of stack {stack.name} (vllm {stack.vllm})"

    def _note(self, lock: Sequence[Pin]) -> str:
        return f"{len(lock)} packages of stack {self.node.stack.name}"

    def _stamp(self, lock: Sequence[Pin]) -> VenvStamp:
        return VenvStamp(
            lock=hashlib.sha256(render_lock(lock).encode()).hexdigest(),
            stack=self.node.stack.name,
            platform=self.node.platform,
            python=self.node.config.environment.python or self.node.stack.python,
            part=self.part,
        )

    def apply(self, on: System) -> None:
        """Install beside the environment in use, at the final place, prove it, and switch to it by one rename."""
        node = self.node
        lock = lock_of(node, on)
        assert lock is not None, "the engine applies no Unknown"
        on.claim(node.venvs)
        beside = replace(self, node=replace(node, venv_name=self._free_name(lock, on)))
        if not isinstance(beside.check(on), Ok):
            beside._build(on, lock)
        on.switch(node.venv, beside.node.venv)

    def _free_name(self, lock: Sequence[Pin], on: System) -> str:
        """Return where to install: never where the environment in use is. What is left there of another run is used
        if it is whole, unless this environment is to be installed again."""
        stamp = self._stamp(lock)
        name = f"venvs/{stamp.stack}-{hashlib.sha256(as_text(stamp).encode()).hexdigest()[:12]}"
        both, used = (name, f"{name}-2"), _link_name(self.node, on)
        if used not in both:
            return name
        free = both[1 - both.index(used)]
        on.clear(f"{self.node.prefix}/{free}")
        return free

    def _build(self, on: System, lock: Sequence[Pin]) -> None:
        node = self.node
        # A killed run may leave an incomplete package that looks complete: reinstall it from the wheelhouse.
        on.clear(node.venv)
        on.claim(node.venv)
        # A node uses the system's Python, the same everywhere and with Python.h; uv prefers its own.
        whose = [] if node.rehearsal else ["--no-managed-python"]
        whose += ["--no-python-downloads"] if node.bundle else []
        _uv(on, node, [uv(), "venv", "--quiet", *whose, "--python", self._interpreter(on), on.real(node.venv)])
        self._fill(on, lock)
        self._prove(on, lock)
        on.write(node.venv_stamp, as_text(replace(self._stamp(lock), place=node.venv_name)).encode())

    def _prove(self, on: System, lock: Sequence[Pin]) -> None:
        """Check what can be checked before a switch; the stamp says that it was."""
        node = self.node
        if complaint := wheels.complaint(node, lock, on):
            what = f"the stack {node.stack.name} does not pass the wheel gate: {complaint}"
            raise Blocked(what, hint=wheels.OTHER_STACK)
        for patch in patches.load(asset("patches")):
            state = PatchedFile(node, patch).check(on)
            if isinstance(state, Conflict):
                raise Blocked(state.message, hint=f"set `fp8.fallback: off`, or {wheels.OTHER_STACK}")
        # Without a former environment nothing is at risk: the probes at the end import all of it.
        if on.entry(f"{node.prefix}/venv") and not node.partial and not node.foreign:
            on.run(on.real(node.python), "-c", _IMPORTS, env={"LD_PRELOAD": ""}, timeout=_IMPORT_SECONDS)

    def _interpreter(self, on: System) -> str:
        del on
        return self.node.config.environment.python or self.node.stack.python

    def _fill(self, on: System, lock: Sequence[Pin]) -> None:
        on.write(self.node.venv_lock, render_lock(lock).encode())
        # The wheels of URLs come from the wheelhouse too.
        wanted = [replace(pin, url=None) for pin in self._wanted(lock)]
        on.write(self.node.installed_lock, render_lock(wanted).encode())
        self._bring(on, lock)
        self._install(on)
        # Record files that differ from RECORD, which some wheels get wrong: only now are they known to be original.
        if rows := wheel_files.unlike_their_records(self.node, on):
            on.write(self.node.wheel_exceptions, rows.encode())

    def _bring(self, on: System, lock: Sequence[Pin]) -> None:
        """Download what is missing of the environment's wheels."""
        if self.node.bundle and (missing := wheelhouse(self.node).missing(self._wanted(lock))):
            names = ", ".join(pin.requirement for pin in missing)
            hint = "create a bundle with them, or omit --bundle to download them"
            raise Blocked(f"the bundle does not have these wheels: {names}", hint=hint)
        try:
            wheelhouse(self.node).fill(on, self._wanted(lock), self._target(on))
        except CommandFailed as failure:
            raise explain_failed_install(failure, self.node) from failure

    def _target(self, on: System) -> tuple[str, ...]:
        """Return uv's options to choose wheels for this environment."""
        return _for_platform(self.node) if self.node.foreign else ("--python", on.real(self.node.venv))

    def _install(self, on: System) -> None:
        """Install from the wheelhouse. uv unpacks the wheels beside the environment's files and only links them."""
        node, house, unpacked = self.node, wheelhouse(self.node), f"{self.node.venv}/unpacked"
        # Without the user's settings of uv: nothing but the wheelhouse is asked.
        own = {"UV_CONFIG_FILE": "/dev/null", "UV_CACHE_DIR": on.real(unpacked), "UV_LINK_MODE": "hardlink"}
        # A machine that never had a network may have no certificates, without which uv does not start.
        own["UV_SYSTEM_CERTS"] = "false"
        source = ("--offline", "--no-index", "--find-links", str(house.folder))
        argv = (*_install_argv(node, on), *source, *self._options(), "-r", on.real(node.installed_lock))
        try:
            on.run(*argv, env={**uv_env(node.cache), **own})
        except CommandFailed as failure:
            if failure.kind in (None, "damaged") and (damaged := house.damaged()):
                house.drop(damaged)
                failure.cause = f"damaged since it was downloaded: {', '.join(damaged)}"
                failure.hint = "it was removed: run the same command again, which downloads it"
                raise
            raise explain_failed_install(failure, node) from failure
        # Before the stamp is written: a file that changes after it counts as changed.
        on.clear(unpacked)

    def _options(self) -> tuple[str, ...]:
        return _for_platform(self.node) if self.node.foreign else ()


class VllmAlone(PythonEnvironment, frozen=True):
    """In a rehearsal without --full: only vLLM's wheel is installed; the rest of the lock is resolved."""

    part: ClassVar[str] = "vllm"

    def _wanted(self, lock: Sequence[Pin]) -> list[Pin]:
        return [pin for pin in lock if pin.name == "vllm"]

    def _summary(self, pins: Sequence[Pin]) -> str:
        del pins
        stack = self.node.stack
        return f"install vllm {stack.vllm} for {self.node.platform} and resolve the rest of stack {stack.name}"

    def _note(self, lock: Sequence[Pin]) -> str:
        rest = f"the {len(lock) - 1} others of its lock resolve (--full installs them)"
        return f"vllm {self.node.stack.vllm} for {self.node.platform}; {rest}"

    def _interpreter(self, on: System) -> str:
        """Return the stack's Python, or ours if it is missing: vLLM's wheel works with any."""
        wanted = super()._interpreter(on)
        environment = {**os.environ, **uv_env(self.node.cache)}
        found = on.ask(uv(), "python", "find", "--no-python-downloads", wanted, env=environment)
        return found.out.strip() if found.ok else sys.executable

    def _bring(self, on: System, lock: Sequence[Pin]) -> None:
        house = wheelhouse(self.node)
        house.refresh()
        whole = [*_install_argv(self.node, on), *_for_platform(self.node), "--dry-run", "-r"]
        if house.missing(lock) and not self.node.bundle:
            _uv(on, self.node, [*whole, on.real(self.node.venv_lock)])
        super()._bring(on, lock)

    def _target(self, on: System) -> tuple[str, ...]:
        del on
        return _for_platform(self.node)

    def _options(self) -> tuple[str, ...]:
        return *_for_platform(self.node), "--no-deps"


class FormerEnvironments(Struct, frozen=True):
    """No environment but the one in use, unless `environment.keep_old` is set."""

    key: ClassVar[str] = "former-environments"
    node: Node

    def check(self, on: Reader) -> State:
        former = self._former(on)
        if not former:
            return Ok()
        if self.node.config.environment.keep_old:
            return Ok(f"kept: {', '.join(former)}")
        return Drift(f"remove the former environment {', '.join(former)}")

    def apply(self, on: System) -> None:
        for name in self._former(on):
            on.clear(f"{self.node.venvs}/{name}")

    def _former(self, on: Reader) -> list[str]:
        used = _link_name(self.node, on)
        return [name for name in on.names(self.node.venvs) if f"venvs/{name}" != used]


def _link_name(node: Node, on: Reader) -> str | None:
    """Return the name of the environment below the prefix that the link `node.venv` leads to; None if it is no link
    of ours."""
    found = on.entry(node.venv)
    leads = found.target if found and found.kind == "link" else ""
    return leads if leads.startswith("venvs/") else None


def environment_of(node: Node) -> PythonEnvironment:
    return VllmAlone(node) if node.partial else PythonEnvironment(node)


def wheelhouse(node: Node) -> Wheelhouse:
    return Wheelhouse(node.cache / "wheels")


def _for_platform(node: Node) -> tuple[str, ...]:
    return for_platform(node.platform, node.stack.python)


def _install_argv(node: Node, on: System) -> tuple[str, ...]:
    hashes = ("--require-hashes", "--only-binary", ":all:")
    return uv(), "pip", "install", "--color", "never", *hashes, "--python", on.real(node.venv)


def _uv(on: System, node: Node, argv: list[str]) -> None:
    try:
        run_uv(on, argv, uv_env(node.cache))
    except CommandFailed as failure:
        raise explain_failed_install(failure, node) from failure


def explain_failed_install(failure: CommandFailed, node: Node) -> CommandFailed:
    said = "\n".join(failure.output)
    if failure.kind not in (None, "network", "server", "damaged"):
        return failure
    if "Hash mismatch" in said:
        failure.cause = "a wheel does not have the hash in the lock: it is damaged, or not the locked file"
        failure.hint = "it was not installed; run again, and if the error remains, stop and report it"
    elif address := _not_fetched(failure, said, node):
        failure.cause = f"the stack {node.stack.name} locks a wheel by its URL, which cannot be downloaded: {address}"
        failure.hint = _another_way(address, node)
    elif failure.kind == "network":
        failure.cause = "the package index cannot be reached, or the connection was lost"
        failure.hint = "check the network and run the command again; the download resumes where it stopped"
    return failure


def _not_fetched(failure: CommandFailed, said: str, node: Node) -> str:
    """Return the URL of a wheel, named by the stack, that could not be downloaded; "" if something else failed."""
    # uv prints a URL as given or percent-encoded, and may break it across lines.
    unbroken = unquote("".join(said.replace("`", "").split()))
    addresses = [pin.url for pin in node.wheels.wheels if pin.url]
    if isinstance(failure, NotDownloaded) and failure.url in addresses:
        return failure.url
    return next((each for each in addresses if f"Failedtofetch:{unquote(each)}" in unbroken), "")


def _another_way(address: str, node: Node) -> str:
    host = urlsplit(address).hostname
    hint = f"allow this node to reach {host}, then run the same command again: finished downloads are kept"
    for other in map(stacks.load, (stacks.DEFAULT, *stacks.names())):
        if node.platform in other.platforms and not other.platforms[node.platform].wheels:
            return f"{hint}. Or use a stack that needs only the package index: `--stack {other.name}`"
    return hint


def lock_of(node: Node, on: Reader) -> tuple[Pin, ...] | None:
    """Return the pins to install: the shipped ones if every hash is known, else the recorded ones.

    None before they are recorded.
    """
    if node.wheels.complete:
        return node.wheels.locked()
    if on.entry(node.lock_record) is None:
        return None
    try:
        pins = parse_lock((on.read(node.lock_record) or b"").decode())
    except (OSError, ValueError, StackError) as error:
        raise _lock_damaged(node, on, str(error)) from error
    if not pins:
        raise _lock_damaged(node, on, "it pins nothing")
    return pins


def _lock_damaged(node: Node, on: Reader, why: str) -> StateDamaged:
    # It is not determined again without a word: the versions and hashes are what the first install has pinned.
    path = on.real(node.lock_record)
    hint = f"restore it from a backup; or delete it (`rm -r {path}`): versions and hashes are then recorded again"
    return StateDamaged(f"the recorded lock {path} is damaged: {why[:200]}", hint=hint)


def installed(node: Node, on: Reader) -> dict[str, str]:
    """Return name -> version of the packages in the environment, from its folder."""
    site = site_packages(node, on)
    found = {}
    for name in on.names(site) if site else ():
        if name.endswith(".dist-info"):
            package, _, version = name.removesuffix(".dist-info").rpartition("-")
            found[canonical(package)] = version
    return found


def _listing(pins: dict[str, str]) -> str:
    return "".join(f"{name}=={version}\n" for name, version in sorted(pins.items()))
