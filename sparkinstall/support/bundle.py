"""One archive with what somebody far away needs to see of a node, masked. It is made of reads; nothing is sent.

It is made when things are broken, so a part that cannot be read is named in it and never stops the rest.
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
from typing import Any

from msgspec import Struct

from sparkinstall import __version__, safe_yaml
from sparkinstall.diagnose import judge, search, signatures
from sparkinstall.errors import Problem
from sparkinstall.facts import machine
from sparkinstall.facts.sysfs import is_connectx
from sparkinstall.journal.state_dir import FOLDER
from sparkinstall.layout import unit_path
from sparkinstall.node import Node, site_packages
from sparkinstall.resources.netplan import files
from sparkinstall.services import UNITS
from sparkinstall.support import doctor
from sparkinstall.support.mask import Mask
from sparkinstall.system import Reader

TOP = "sparkinstall-support"
"""The folder in the archive."""

_MIB = 1 << 20
_JOURNAL, _LOG, _ALL_LOGS, _UNIT, _SMALL = 2 * _MIB, 2 * _MIB, 6 * _MIB, _MIB, _MIB // 2
_RUNS, _LEAST = 5, 1 << 16
_PATIENCE = 20.0
_KERNEL = "NVRM|Xid|mlx5|AER|Out of memory|oom-kill"
_PACKAGES = re.compile(r"nvidia|libnvidia|cuda-|libnccl|linux-image|dgx|mlnx|rdma|libibverbs|netplan|python3\.1\d")
# What was asked and answered, as vLLM's request logger writes it; a line may be cut.
_ASKED = re.compile(
    r"((?:prompt|\boutput)(?:_token_ids)?: )(?:'(?:[^'\\\n]|\\.)*'?|\"(?:[^\"\\\n]|\\.)*\"?|[\[(][^\])\n]*[\])]?)"
)
_IDENTITY = re.compile(r"(?im)^(.*\bidentity[\"']?\s*:[ \t]*)\S.*$")
_ODD = re.compile(r"[^\w.+@=-]")

_WHAT = {
    "README.txt": "this page",
    "facts.json": "the machine: driver, kernel, memory, network cards, versions of packages",
    "settings.json": "each setting, and where its value came from",
    "state.json": "what the last run was asked for, and what it could not prove",
    "journal.jsonl": "what sparkinstall has changed on this node",
    "preflight.json": "is it a node that can be set up, and one of those that are known to be bad?",
    "verify.json": "`sparkinstall verify`, run for this archive, without load",
    "diagnose.json": "known failures that the logs in here tell of",
    "decisions": "what was decided on this node: FP8 kernels, transport, the build of NCCL",
    "env": "the variables that the services start with",
    "logs": "the logs of the last runs, the ends of them",
    "netplan": "the network's configuration",
    "units": "the services: their files, and the end of what they said",
}


class Member(Struct, frozen=True):
    """A file of the archive; its name is below `TOP`."""

    name: str
    data: bytes


class Bundle(Struct, frozen=True):
    """What is to be packed. `missing`: what could not be read and why, masked. `masked`: what was, in words."""

    members: tuple[Member, ...]
    missing: tuple[str, ...]
    masked: str

    def packed(self) -> bytes:
        """A tar.gz: plain files, owned by nobody in particular."""
        whole, now = io.BytesIO(), int(time.time())
        with gzip.GzipFile("", "wb", 9, whole, 0) as stream, tarfile.open(fileobj=stream, mode="w") as archive:
            for member in self.members:
                info = tarfile.TarInfo(f"{TOP}/{member.name}")
                info.size, info.mode, info.mtime = len(member.data), 0o644, now
                archive.addfile(info, io.BytesIO(member.data))
        return whole.getvalue()


def gather(node: Node, on: Reader, mask: Mask, told: Mapping[str, Any], missing: Iterable[str] = ()) -> Bundle:
    """Read everything that belongs into the archive.

    Args:
        told: results of other verbs and settings, by the name of the JSON member that they become.
        missing: what could not be found out before.
    """
    found = _Gathering(on, mask, list(missing))
    for name, data in told.items():
        found.add_json(name, lambda data=data: data)  # type: ignore[misc]
    found.add_json("facts.json", lambda: _facts(node, on))
    found.add_json("state.json", lambda: _state(on))
    with found.noting("the journal"):
        found.add("journal.jsonl", _journal(found, mask))
    _add_files(found, node)
    _add_logs(found)
    _add_units(found)
    _add_netplan(found)
    found.add_json("diagnose.json", lambda: _diagnosed(found.heard))
    return found.bundle()


class _Gathering:
    """Members as they are found, masked at once; and what could not be found."""

    def __init__(self, on: Reader, mask: Mask, missing: list[str]) -> None:
        self.on = on
        self._mask, self._missing = mask, missing
        self._members: dict[str, bytes] = {}
        # Logs but for prompts and answers; not masked, as the signatures of known failures do not know stand-ins.
        self.heard: dict[str, str] = {}

    @contextmanager
    def noting(self, what: str) -> Iterator[None]:
        """What goes wrong in here is named in the archive."""
        try:
            yield
        except Problem as problem:
            self._missing.append(f"{what}: {problem.message}")
        except OSError as error:
            self._missing.append(f"{what}: {(error.strerror or str(error)).lower()}")
        except Exception as error:  # of all things, this must not end on what is broken
            self._missing.append(f"{what}: {type(error).__name__}: {error}")

    def add(self, name: str, text: str) -> None:
        """A member; `text` has been masked. An empty one tells nothing."""
        parts = [_ODD.sub("_", part.replace("<", "").replace(">", "")) for part in name.split("/")]
        safe = "/".join(part for part in parts if part.strip("."))
        while safe in self._members:
            safe += "_"
        if text.strip():
            self._members[safe] = text.encode("utf-8", "replace")

    def add_json(self, name: str, make: Callable[[], Any]) -> None:
        with self.noting(name):
            made = make()
            if made:
                self.add(name, json.dumps(self._mask.data(made), indent=1, default=str) + "\n")

    def add_text(self, name: str, text: str) -> None:
        with self.noting(name):
            self.add(self._mask.text(name), self._mask.text(_unasked(text)))

    def add_log(self, name: str, text: str) -> None:
        self.heard[name] = _unasked(text)
        self.add_text(name, text)

    def add_file(self, name: str, path: str, limit: int = _SMALL) -> None:
        with self.noting(path):
            self.add_text(name, self.end_of(path, limit))

    def end_of(self, path: str, limit: int) -> str:
        """The last `limit` bytes of a plain file; empty where there is none. Links are not followed."""
        entry = self.on.entry(path)
        if entry is None or entry.kind != "file":
            return ""
        try:
            data = _end(self.on.real(path), limit)
        except PermissionError:
            # Through sudo, where that needs no password.
            data = (self.on.read(path) or b"")[-limit:]
        return _whole_lines(data, entry.size > limit).decode(errors="replace")

    def bundle(self) -> Bundle:
        missing = tuple(map(self._mask.text, self._missing))
        members = {**self._members, "README.txt": b""}
        members["README.txt"] = _readme(sorted(members), missing, self._mask.told()).encode()
        return Bundle(tuple(Member(name, members[name]) for name in sorted(members)), missing, self._mask.told())


def _unasked(text: str) -> str:
    return _ASKED.sub(r"\1[hidden]", text)


def _end(real: str, limit: int) -> bytes:
    handle = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(handle, "rb") as file:
        file.seek(max(0, os.fstat(handle).st_size - limit))
        return file.read(limit)


def _whole_lines(data: bytes, cut: bool) -> bytes:
    # Half a line at the front might hold half a secret, which looks like none.
    return b"[cut: the end follows]\n" + data.partition(b"\n")[2] if cut else data


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
        return {**found, "rehearsal": "the machine around it is not the node, and was not asked"}
    return {**found, "cpus": machine.cores(), "debian_packages": _debian_packages(on), "programs": _programs(on)}


def _line(on: Reader, path: str) -> str:
    return (on.read(path) or b"").decode(errors="replace").strip()


def _python_packages(node: Node, on: Reader) -> list[str]:
    """`name==version` of what is in the environment, from the names of its folders."""
    site = site_packages(node, on)
    stems = [name.removesuffix(".dist-info") for name in on.names(site or "") if name.endswith(".dist-info")]
    return ["==".join(stem.rsplit("-", 1)) for stem in stems]


def _debian_packages(on: Reader) -> list[str]:
    said = on.ask("dpkg-query", "-W", "-f=${Package}==${Version}\\n", timeout=_PATIENCE).out
    return [line for line in said.splitlines() if _PACKAGES.match(line)]


def _programs(on: Reader) -> dict[str, str]:
    """What programs say of the machine, by their command line; those that are not here are left out."""
    asked = [
        ("uname", "-a"), ("nvidia-smi", "-q"), ("ip", "-br", "link"), ("ip", "-br", "address"), ("rdma", "link"),
        ("ibv_devinfo",), ("df", "-h"), ("systemctl", "--failed", "--no-pager", "--plain"),
        *(("ethtool", "-i", name) for name in on.names("/sys/class/net") if is_connectx(on, name)),
    ]  # fmt: skip
    answers = {" ".join(argv): on.ask(*argv, timeout=_PATIENCE) for argv in asked}
    return {name: (answer.out + answer.err)[:_SMALL] for name, answer in answers.items() if answer.code != 127}


def _state(on: Reader) -> dict[str, Any]:
    options = on.read(f"{FOLDER}/options.json") or b"{}"
    return {"options": json.loads(options), "unproven": _line(on, f"{FOLDER}/unproven").split()}


def _journal(found: _Gathering, mask: Mask) -> str:
    """Line by line, since one that cannot be read may be the very reason for this archive."""
    lines = found.end_of(f"{FOLDER}/journal.jsonl", _JOURNAL).splitlines()
    return "".join(f"{_record(line, mask)}\n" for line in lines)


def _record(line: str, mask: Mask) -> str:
    try:
        return json.dumps(mask.data(json.loads(line)))
    except (ValueError, RecursionError):
        return mask.text(line)


def _add_files(found: _Gathering, node: Node) -> None:
    decisions = (node.fp8_decision, node.transport_decision, node.nccl_stamp)
    for path in decisions:
        found.add_file(f"decisions/{path.rpartition('/')[2]}", path)
    with found.noting(node.env_folder):
        for name in found.on.names(node.env_folder):
            if name.endswith(".env"):
                found.add_file(f"env/{name}", f"{node.env_folder}/{name}")


def _add_logs(found: _Gathering) -> None:
    """The newest runs first, until there is no more room."""
    room, top = _ALL_LOGS, f"{FOLDER}/logs"
    with found.noting(top):
        paths = [
            f"{run}/{name}"
            for run in sorted(found.on.names(top), reverse=True)[:_RUNS]
            for name in found.on.names(f"{top}/{run}")
        ]
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
            _add_said(found, f"units/{unit}.log", "-u", unit)
        _add_said(found, "units/kernel.log", "-k", "-g", _KERNEL)


def _add_said(found: _Gathering, name: str, *which: str) -> None:
    """The end of what the system's journal has of it, as root where that goes without asking."""
    command = ("journalctl", *which, "--no-pager", "-o", "short-iso", "-n", "2000")
    answer = found.on.ask(*command, timeout=_PATIENCE, root=True)
    if not answer.ok:
        answer = found.on.ask(*command, timeout=_PATIENCE)
    if answer.out and not answer.out.startswith("-- No entries"):
        text = _whole_lines(answer.out[-_UNIT:].encode(), len(answer.out) > _UNIT).decode()
        found.add_log(name, text)


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
        # The names of Wi-Fi networks are found as YAML; what is none may hold some that are not known.
        if b"access-points" in content:
            raise Problem("it is no YAML, and there is Wi-Fi in it: left out") from error
    return _IDENTITY.sub(r"\1[hidden]", files.shown({path: content}))


def _diagnosed(heard: Mapping[str, str]) -> dict[str, Any]:
    """The known failures in the logs; that there is none in them is worth knowing too."""
    if not heard:
        return {}
    known, readings = signatures.load(), []
    for name, text in heard.items():
        reading = search.Search(known)
        reading.feed(text.encode())
        reading.end()
        readings.append(judge.Reading(name, reading))
    judged = judge.judge(readings)
    return {"logs": list(heard), "found": [_failure(each) for each in (*judged.failures, *judged.warnings)]}


def _failure(found: judge.Found) -> dict[str, Any]:
    signature = found.signature
    places = [{"log": place.log, "line": place.line.number, "text": place.line.text} for place in found.places]
    return {
        "name": signature.name, "title": signature.title, "severity": signature.severity, "fix": signature.fix,
        "count": found.count, "explained_by": list(found.explained_by), "places": places, "hint": signature.hint,
    }  # fmt: skip


def _readme(names: Iterable[str], missing: Iterable[str], masked: str) -> str:
    today = time.strftime("%Y-%m-%d", time.gmtime())
    whats = {name: _WHAT.get(name) or _WHAT.get(name.split("/")[0], "") for name in names}
    lines = [
        f"Made by sparkinstall {__version__} on {today}. Nothing was sent anywhere.",
        "",
        *(f"  {name:44} {what}".rstrip() for name, what in whats.items()),
        "",
        "What could not be read:",
        *(f"  {each}" for each in missing or ("nothing",)),
        "",
        f"Masked: {masked or 'nothing had to be'}.",
        "A stand-in such as <ip-1> is the same thing in all files.",
        "A program cannot know what only you know to be private: look the files over before you show them.",
    ]
    return "\n".join(lines) + "\n"
