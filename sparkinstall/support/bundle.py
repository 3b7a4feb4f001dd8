"""Build the support bundle: one archive of masked facts, logs and state of a node. It only reads and sends nothing.

It is made when things are broken, so a part that cannot be read is listed in the archive and never stops the rest.
"""

import gzip
import io
import json
import os
import platform
import re
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from msgspec import Struct, to_builtins

from sparkinstall import __version__, safe_yaml
from sparkinstall.diagnose import judge, signatures
from sparkinstall.diagnose.index import index_of
from sparkinstall.diagnose.sources import Log
from sparkinstall.errors import Problem
from sparkinstall.facts import machine
from sparkinstall.facts.sysfs import is_connectx
from sparkinstall.facts.units import journal
from sparkinstall.journal.state_dir import FOLDER
from sparkinstall.layout import unit_path
from sparkinstall.node import Node, site_packages
from sparkinstall.resources.netplan import files
from sparkinstall.services import UNITS
from sparkinstall.support import doctor
from sparkinstall.support.mask import Mask
from sparkinstall.system import Reader

TOP = "sparkinstall-support"
"""Name of the top folder in the archive."""

_MIB = 1 << 20
_JOURNAL, _LOG, _ALL_LOGS, _UNIT, _SMALL = 2 * _MIB, 2 * _MIB, 6 * _MIB, _MIB, _MIB // 2
_RUNS, _LEAST = 5, 1 << 16
_TIMEOUT = 20.0
_MOST_TELLING = 20
_KERNEL = "NVRM|Xid|mlx5|AER|Out of memory|oom-kill|Unable to handle kernel|Internal error|BUG:|Oops|Kernel panic"
_PACKAGES = re.compile(r"nvidia|libnvidia|cuda-|libnccl|linux-image|dgx|mlnx|rdma|libibverbs|netplan|python3\.1\d")
# Prompts and outputs as vLLM's request logger writes them; a line may be truncated.
_PROMPTS = re.compile(
    r"((?:prompt|\boutput)(?:_token_ids)?: )(?:'(?:[^'\\\n]|\\.)*'?|\"(?:[^\"\\\n]|\\.)*\"?|[\[(][^\])\n]*[\])]?)"
)
_IDENTITY = re.compile(r"(?im)^(.*\bidentity[\"']?\s*:[ \t]*)\S.*$")
_ODD = re.compile(r"[^\w.+@=-]")

_WHAT = {
    "README.txt": "this page",
    "facts.json": "the machine: driver, kernel, memory, network cards, versions of packages",
    "settings.json": "each setting and its origin",
    "state.json": "the options of the last run and its failed probes",
    "journal.jsonl": "the changes that sparkinstall made on this node",
    "preflight.json": "preflight checks, and the rules for known-bad hosts",
    "verify.json": "result of `sparkinstall verify`, run for this archive, without load",
    "diagnose.json": "known failures found in these logs",
    "decisions": "decisions made on this node: FP8 kernels, transport, NCCL build",
    "env": "environment variables of the services",
    "logs": "the ends of the logs of the last runs",
    "netplan": "network configuration",
    "units": "unit files of the services, and the ends of their logs",
}


class Member(Struct, frozen=True):
    """A file of the archive; its name is below `TOP`."""

    name: str
    data: bytes


class Bundle(Struct, frozen=True):
    """Contents of the archive. `missing`: what could not be read and why, masked. `masked`: kinds of masked values."""

    members: tuple[Member, ...]
    missing: tuple[str, ...]
    masked: str

    def packed(self) -> bytes:
        """Return the archive as tar.gz: plain files without an owner."""
        whole, now = io.BytesIO(), int(time.time())
        with gzip.GzipFile("", "wb", 9, whole, 0) as stream, tarfile.open(fileobj=stream, mode="w") as archive:
            for member in self.members:
                info = tarfile.TarInfo(f"{TOP}/{member.name}")
                info.size, info.mode, info.mtime = len(member.data), 0o644, now
                archive.addfile(info, io.BytesIO(member.data))
        return whole.getvalue()


def gather(node: Node, on: Reader, mask: Mask, results: Mapping[str, Any], missing: Iterable[str] = ()) -> Bundle:
    """Collect the contents of the archive.

    Args:
        results: settings and results of other verbs, by the name of their JSON member.
        missing: what the caller could not read.
    """
    found = _Gathering(on, mask, list(missing))
    for name, data in results.items():
        found.add_json(name, lambda data=data: data)  # type: ignore[misc]
    found.add_json("facts.json", lambda: _facts(node, on))
    found.add_json("state.json", lambda: _state(on))
    with found.noting("the journal"):
        found.add("journal.jsonl", _journal(found, mask))
    _add_files(found, node)
    _add_logs(found)
    _add_units(found)
    _add_netplan(found)
    found.add_json("diagnose.json", lambda: _diagnose(found.logs))
    return found.bundle()


class _Gathering:
    """Collects members, masking each at once, and notes what could not be read."""

    def __init__(self, on: Reader, mask: Mask, missing: list[str]) -> None:
        self.on = on
        self._mask, self._missing = mask, missing
        self._members: dict[str, bytes] = {}
        # Logs without prompts and outputs; unmasked, because the signatures of known failures expect the original text.
        self.logs: dict[str, str] = {}

    @contextmanager
    def noting(self, what: str) -> Iterator[None]:
        """List errors of this block in the archive instead of raising them."""
        try:
            yield
        except Problem as problem:
            self._missing.append(f"{what}: {problem.message}")
        except OSError as error:
            self._missing.append(f"{what}: {(error.strerror or str(error)).lower()}")
        except Exception as error:  # a broken node is what the archive is for
            self._missing.append(f"{what}: {type(error).__name__}: {error}")

    def add(self, name: str, text: str) -> None:
        """Add a member of masked text, unless it is empty."""
        parts = [_ODD.sub("_", part.replace("<", "").replace(">", "")) for part in name.split("/")]
        safe = "/".join(part for part in parts if part.strip("."))
        while safe in self._members:
            safe += "_"
        if text.strip():
            self._members[safe] = text.encode("utf-8", "replace")

    def add_json(self, name: str, make: Callable[[], Any]) -> None:
        with self.noting(name):
            if made := make():
                self.add(name, json.dumps(self._mask.data(made), indent=1, default=str) + "\n")

    def add_text(self, name: str, text: str) -> None:
        with self.noting(name):
            self.add(self._mask.text(name), self._mask.text(_without_prompts(text)))

    def add_log(self, name: str, text: str) -> None:
        self.logs[name] = _without_prompts(text)
        self.add_text(name, text)

    def add_file(self, name: str, path: str) -> None:
        with self.noting(path):
            self.add_text(name, self.end_of(path, _SMALL))

    def end_of(self, path: str, limit: int) -> str:
        """Return the last `limit` bytes of a regular file, or "". Links are not followed."""
        entry = self.on.entry(path)
        if entry is None or entry.kind != "file":
            return ""
        try:
            data = _end(self.on.real(path), limit)
        except PermissionError:
            # Read through sudo, if that needs no password.
            data = (self.on.read(path) or b"")[-limit:]
        return _whole_lines(data, entry.size > limit).decode(errors="replace")

    def bundle(self) -> Bundle:
        missing = tuple(map(self._mask.text, self._missing))
        members = {**self._members, "README.txt": b""}
        members["README.txt"] = _readme(sorted(members), missing, self._mask.summary()).encode()
        return Bundle(tuple(Member(name, members[name]) for name in sorted(members)), missing, self._mask.summary())


def _without_prompts(text: str) -> str:
    return _PROMPTS.sub(r"\1[hidden]", text)


def _end(real: str, limit: int) -> bytes:
    handle = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(handle, "rb") as file:
        file.seek(max(0, os.fstat(handle).st_size - limit))
        return file.read(limit)


def _whole_lines(data: bytes, cut: bool) -> bytes:
    # A truncated first line might contain half a secret, which no pattern recognizes.
    return b"[truncated: only the end follows]\n" + data.partition(b"\n")[2] if cut else data


# --- the parts


def _facts(node: Node, on: Reader) -> dict[str, Any]:
    found: dict[str, Any] = {
        "machine": doctor.machine_facts(node, on),
        "arch": platform.machine(),
        "python": platform.python_version(),
        "release": dict(machine.release(on)),
        "os": dict(machine.os_release(on)),
        "cmdline": _line(on, "/proc/cmdline"),
        "meminfo_kb": machine.parse_meminfo(on.read("/proc/meminfo") or b""),
        "python_packages": _python_packages(node, on),
    }
    if on.rehearsal:
        return {**found, "rehearsal": "facts of the machine that runs the rehearsal are left out: it is not the node"}
    return {**found, "cpus": machine.cores(), "debian_packages": _debian_packages(on), "programs": _programs(on)}


def _line(on: Reader, path: str) -> str:
    return (on.read(path) or b"").decode(errors="replace").strip()


def _python_packages(node: Node, on: Reader) -> list[str]:
    """Return `name==version` of each package in the environment, from the names of its .dist-info folders."""
    site = site_packages(node, on)
    stems = [name.removesuffix(".dist-info") for name in on.names(site or "") if name.endswith(".dist-info")]
    return ["==".join(stem.rsplit("-", 1)) for stem in stems]


def _debian_packages(on: Reader) -> list[str]:
    listed = on.ask("dpkg-query", "-W", "-f=${Package}==${Version}\\n", timeout=_TIMEOUT).out
    return [line for line in listed.splitlines() if _PACKAGES.match(line)]


def _programs(on: Reader) -> dict[str, str]:
    """Return the output of programs by their command line; missing programs are left out."""
    commands = [
        ("uname", "-a"), ("nvidia-smi", "-q"), ("ip", "-br", "link"), ("ip", "-br", "address"), ("rdma", "link"),
        ("ibv_devinfo",), ("df", "-h"), ("systemctl", "--failed", "--no-pager", "--plain"),
        *(("ethtool", "-i", name) for name in on.names("/sys/class/net") if is_connectx(on, name)),
    ]  # fmt: skip
    answers = {" ".join(argv): on.ask(*argv, timeout=_TIMEOUT) for argv in commands}
    return {name: (answer.out + answer.err)[:_SMALL] for name, answer in answers.items() if answer.code != 127}


def _state(on: Reader) -> dict[str, Any]:
    options = on.read(f"{FOLDER}/options.json") or b"{}"
    return {"options": json.loads(options), "unproven": _line(on, f"{FOLDER}/unproven").split()}


def _journal(found: _Gathering, mask: Mask) -> str:
    """Mask the journal line by line: a damaged line may be the reason for this archive."""
    lines = found.end_of(f"{FOLDER}/journal.jsonl", _JOURNAL).splitlines()
    return "".join(f"{_record(line, mask)}\n" for line in lines)


def _record(line: str, mask: Mask) -> str:
    try:
        return json.dumps(mask.data(json.loads(line)))
    except (ValueError, RecursionError):
        return mask.text(line)


def _add_files(found: _Gathering, node: Node) -> None:
    for path in (node.fp8_decision, node.transport_decision, node.nccl_stamp):
        found.add_file(f"decisions/{path.rpartition('/')[2]}", path)
    with found.noting(node.env_folder):
        for name in found.on.names(node.env_folder):
            if name.endswith(".env"):
                found.add_file(f"env/{name}", f"{node.env_folder}/{name}")


def _add_logs(found: _Gathering) -> None:
    """Add logs of the newest runs until the size limit is reached."""
    room, top = _ALL_LOGS, f"{FOLDER}/logs"
    with found.noting(top):
        runs = sorted(found.on.names(top), reverse=True)[:_RUNS]
        paths = [f"{run}/{name}" for run in runs for name in found.on.names(f"{top}/{run}")]
        for path in paths:
            with found.noting(f"{top}/{path}"):
                text = found.end_of(f"{top}/{path}", min(_LOG, room))
                room -= len(text)
                found.add_log(f"logs/{path}", text)
            if room < _LEAST:
                break


def _add_units(found: _Gathering) -> None:
    names = [unit.name for unit in UNITS]
    for unit in names:
        path = unit_path(unit)
        found.add_file(f"units/{unit}", path)
        with found.noting(f"{path}.d"):
            for name in found.on.names(f"{path}.d"):
                found.add_file(f"units/{unit}.d/{name}", f"{path}.d/{name}")
    if not found.on.rehearsal:
        for unit in names:
            _add_journal(found, f"units/{unit}.log", "-u", unit)
        _add_journal(found, "units/kernel.log", "-k", "-g", _KERNEL)
        _add_journal(found, "units/kernel-of-previous-boot.log", "-k", "--boot=-1", "-g", _KERNEL)


def _add_journal(found: _Gathering, name: str, *which: str) -> None:
    """Add the end of the system journal of a unit or the kernel."""
    if said := journal(found.on, *which, "-o", "short-iso", "-n", "2000", timeout=_TIMEOUT):
        found.add_log(name, _whole_lines(said[-_UNIT:].encode(), len(said) > _UNIT).decode())


def _add_netplan(found: _Gathering) -> None:
    with found.noting(files.OWN_FOLDER):
        for name in found.on.names(files.OWN_FOLDER):
            path = f"{files.OWN_FOLDER}/{name}"
            entry = found.on.entry(path)
            if name.endswith(".yaml") and entry and entry.kind == "file":
                with found.noting(path):
                    found.add_text(f"netplan/{name}", _netplan(path, found.on.read(path) or b""))


def _netplan(path: str, content: bytes) -> str:
    try:
        safe_yaml.load(content)
    except Exception as error:
        # Wi-Fi names are read from the YAML; a file that cannot be parsed may contain unknown ones.
        if b"access-points" in content:
            raise Problem("left out: it contains Wi-Fi settings but is not valid YAML") from error
    return _IDENTITY.sub(r"\1[hidden]", files.shown({path: content}))


def _diagnose(logs: Mapping[str, str]) -> dict[str, Any]:
    """Return the known failures in the logs, also if there are none."""
    if not logs:
        return {}
    index = index_of(signatures.load())
    read = (judge.read(Log(name, partial(iter, [text.encode()])), index) for name, text in logs.items())
    diagnosis = judge.judge(read)
    return {
        "logs": list(logs),
        "found": [*map(_failure, diagnosis.found)],
        "telling": to_builtins(diagnosis.telling[:_MOST_TELLING]),
    }


def _failure(found: judge.Found) -> dict[str, Any]:
    told = to_builtins(found)
    brief = {name: told[name] for name in ("name", "title", "severity", "role", "fix", "count", "explained_by")}
    return {**brief, "places": told["lines"], "hint": found.hint}


def _readme(names: Iterable[str], missing: Iterable[str], masked: str) -> str:
    today = time.strftime("%Y-%m-%d", time.gmtime())
    meanings = {name: _WHAT.get(name) or _WHAT.get(name.split("/")[0], "") for name in names}
    lines = [
        f"Made by sparkinstall {__version__} on {today}. Nothing was sent anywhere.",
        "",
        *(f"  {name:44} {what}".rstrip() for name, what in meanings.items()),
        "",
        "What could not be read:",
        *(f"  {each}" for each in missing or ("nothing",)),
        "",
        f"Masked: {masked or 'nothing'}.",
        "A placeholder such as <ip-1> stands for the same value in all files.",
        "A program cannot recognize everything private: review the files before you share them.",
    ]
    return "\n".join(lines) + "\n"
