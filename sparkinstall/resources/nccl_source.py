"""Get NCCL's source: from the upstream repository, a tarball, or a folder."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from threading import Event
from typing import Any

from msgspec import Struct

from sparkinstall import schema
from sparkinstall.downloads import fetch, in_parallel, kept_when_interrupted, sha256_of
from sparkinstall.errors import BadConfig, Blocked, CommandFailed, StateDamaged
from sparkinstall.own_files import read_regular
from sparkinstall.system import Reader, System, processes
from sparkinstall.system.local import replace_file
from sparkinstall.system.locks import folder_locked

REPOSITORY = "https://github.com/NVIDIA/nccl.git"
_VERSION_PARTS = re.compile(r"^NCCL_(?:MAJOR|MINOR|PATCH)\s*:=\s*(\d+)", re.MULTILINE)
_SHA256 = re.compile(r"[0-9a-f]{64}")


class NcclSource(Struct, frozen=True):
    """NCCL `version` from `where` ("git", a tarball's path or URL, or a folder).

    `commit` is the expected commit of the tag; `sha256` the expected hash of the tarball, None: recorded at first use.
    `cache` is a real folder that outlives the prefix. `offline`: nothing may be downloaded.
    """

    version: str
    tag: str
    commit: str
    where: str
    sha256: str | None
    cache: Path
    offline: bool = False

    @property
    def kind(self) -> str:
        if self.where == "git":
            return "git"
        return "folder" if Path(self.where).expanduser().is_dir() else "tarball"

    def identity(self) -> str:
        """Return what identifies the source's content, without fetching it."""
        if self.kind == "git":
            return f"commit {self.commit}"
        if self.kind == "folder":
            return f"folder {_tree_digest(Path(self.where).expanduser())}"
        return f"tarball {self.sha256 or self._recorded().get(self.where, 'not yet seen: ' + self.where)}"

    @property
    def _record(self) -> Path:
        return self.cache / "tarballs.json"

    def _recorded(self) -> dict[str, str]:
        """Return the sha256 of each tarball seen so far, by its address."""
        try:
            return schema.read_json(dict[str, str], read_regular(self._record), str(self._record))
        except FileNotFoundError:
            return {}
        except (OSError, schema.Malformed) as error:
            why = error.complaint if isinstance(error, schema.Malformed) else error.strerror
            hint = f"delete it (`rm -r {self._record}`): the hash of a tarball is then recorded at its next use"
            raise StateDamaged(f"{self._record} cannot be read: {why}", hint=hint) from error

    def out_of_reach(self, on: Reader) -> str:
        """Return why the upstream repository is unavailable, or "". Contacts it only if there is no cached copy."""
        # Whether the bundle of an offline run has it was checked before.
        if self.kind != "git" or self.offline or (self.mirror / "HEAD").exists():
            return ""
        environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
        answer = on.ask("git", "ls-remote", "--exit-code", REPOSITORY, self.tag, timeout=20, env=environment)
        return "" if answer.ok else f"{REPOSITORY} cannot be reached from here"

    def hold_to(self, identity: str) -> None:
        """Record another node's hash of the tarball, if it was never seen here."""
        kind, _, sha256 = identity.partition(" ")
        recorded = self._recorded()
        is_open = self.kind == kind == "tarball" and not self.sha256 and self.where not in recorded
        if is_open and _SHA256.fullmatch(sha256):
            self._note({**recorded, self.where: sha256})

    def _note(self, recorded: Mapping[str, Any]) -> None:
        self.cache.mkdir(parents=True, exist_ok=True)
        replace_file(str(self._record), (json.dumps(recorded, indent=2) + "\n").encode(), 0o644)

    @property
    def mirror(self) -> Path:
        """The cached copy of the upstream repository."""
        return self.cache / mirror_name(self.tag)

    def bring(self, on: System, to: str) -> str:
        """Copy the source to the build folder `to`; return the node path of its top folder.

        Raises:
            BadConfig, Blocked, CommandFailed: it is missing, or not the expected source.
        """
        top = {"git": self._clone, "folder": self._use_folder, "tarball": self._unpack}[self.kind](on, to)
        self._require_version(on, top)
        return top

    def _require_version(self, on: Reader, top: str) -> None:
        text = (on.read(f"{top}/makefiles/version.mk") or b"").decode(errors="replace")
        found = ".".join(_VERSION_PARTS.findall(text))
        if found != self.version.split("-")[0]:
            raise Blocked(
                f"{self.where} is the source of NCCL {found or 'of unknown version'}, not of {self.version}",
                hint="set `nccl.source` to the right source, or `nccl.version` to this version",
            )

    def _clone(self, on: System, to: str) -> str:
        mirror = self.mirrored(on)
        on.clear(to)
        on.run("git", "clone", "--quiet", "--branch", self.tag, str(mirror), on.real(to))
        return to

    def mirrored(self, on: System) -> Path:
        """Return the cached copy of the upstream repository at the expected commit; download it if it is missing.

        Raises:
            Blocked: the tag is not the expected commit.
            CommandFailed: the repository cannot be reached.
        """
        mirror = self.mirror
        # Another run may be downloading it to the same place.
        with folder_locked(mirror.parent):
            if not (mirror / "HEAD").exists():
                self._mirror(on, mirror)
        head = on.ask("git", "-C", str(mirror), "rev-parse", f"{self.tag}^{{commit}}").out.strip()
        if head != self.commit:
            shutil.rmtree(mirror, ignore_errors=True)
            raise Blocked(
                f"the tag {self.tag} of {REPOSITORY} is not the expected commit",
                cause=f"expected {self.commit}, found {head or 'nothing'}",
                hint="the tag was moved or the download is damaged: investigate before you continue",
            )
        return mirror

    def _mirror(self, on: System, mirror: Path) -> None:
        self._refuse_download(REPOSITORY)
        waiting = mirror.with_suffix(".new")
        shutil.rmtree(waiting, ignore_errors=True)
        mirror.parent.mkdir(parents=True, exist_ok=True)
        try:
            clone = ("git", "clone", "--progress", "--bare", "--depth", "1", "--branch", self.tag)
            on.run(*clone, REPOSITORY, str(waiting), env={"GIT_TERMINAL_PROMPT": "0"})
        except CommandFailed as failure:
            raise _unreachable(failure) from failure
        waiting.rename(mirror)

    def _refuse_download(self, address: str) -> None:
        if self.offline:
            raise Blocked(
                f"the bundle does not have NCCL's source, and nothing is downloaded from {address}",
                hint="create a bundle with it, set `nccl.source` to a file or a folder, or use `nccl.mode: wheel`",
            )

    def _use_folder(self, on: System, to: str) -> str:
        on.clear(to)
        shutil.copytree(
            Path(self.where).expanduser(), on.real(to), symlinks=True, ignore=shutil.ignore_patterns(".git", "build")
        )
        return self._top(on, to)

    def _unpack(self, on: System, to: str) -> str:
        tarball = self._tarball(on)
        self._hold_to_hash(tarball)
        on.clear(to)
        on.make_dir(to)
        try:
            # tar keeps members inside the folder; Python's tarfile does so only since 3.11.4.
            on.run("tar", "--extract", "--no-same-owner", f"--file={tarball}", f"--directory={on.real(to)}")
        except CommandFailed as failure:
            if failure.kind:
                raise
            raise Blocked(
                f"{self.where} cannot be unpacked: {' '.join(failure.output[-1:])}",
                hint="check that it is NCCL's source and complete",
            ) from failure
        return self._top(on, to)

    def _tarball(self, on: System) -> Path:
        if self.where.startswith(("https://", "http://")):
            tarball = self.cache / tarball_name(self.where)
            if not tarball.exists():
                self._refuse_download(self.where)
            return self._downloaded(on, tarball)
        path = Path(self.where).expanduser()
        if not path.is_file():
            raise BadConfig(
                f"`nccl.source` {self.where} is neither a file nor a folder",
                hint="set it to NCCL's tarball or source folder, or remove the setting to use the upstream repository",
            )
        return path

    def _downloaded(self, on: System, to: Path) -> Path:
        over = Event()

        def tell(done: int, total: int) -> None:
            if over.is_set():
                raise CommandFailed("the run has ended")
            on.progress(done, total, "bytes")

        with kept_when_interrupted():
            in_parallel(lambda url: fetch(url, to, tell), [self.where], over.set, processes.refuse_if_stopped)
        return to

    def _hold_to_hash(self, tarball: Path) -> None:
        found, recorded = sha256_of(tarball), self._recorded()
        expected = self.sha256 or recorded.get(self.where)
        if expected is None:
            self._note({**recorded, self.where: found})
        elif found != expected:
            # Delete a wrong download, or the cache would return it again.
            if tarball.is_relative_to(self.cache):
                tarball.unlink()
            raise Blocked(
                f"{self.where} does not have the expected hash",
                cause=f"expected sha256 {expected}, found {found}",
                hint="the file is damaged or was replaced; it was not used",
            )

    def _top(self, on: Reader, to: str) -> str:
        """Return the folder with the Makefile: usually one level down in a tarball."""
        for folder in (to, *(f"{to}/{name}" for name in on.names(to))):
            if on.entry(f"{folder}/src") and on.entry(f"{folder}/makefiles"):
                return folder
        raise Blocked(f"{self.where} is not NCCL's source", hint="NCCL's top folder contains `src` and `makefiles`")


def mirror_name(tag: str) -> str:
    """Return the name in the cache of the repository's copy at this tag."""
    return f"nccl-{tag}.git"


def tarball_name(url: str) -> str:
    """Return the name in the cache of the tarball at this URL."""
    return f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.tar"


def _unreachable(failure: CommandFailed) -> CommandFailed:
    if failure.kind == "network":
        failure.cause = f"{REPOSITORY} cannot be reached"
        failure.hint = "set `nccl.source` to a tarball or a folder, or check the network and run again"
    return failure


def _tree_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for base, dirs, files in os.walk(folder):
        dirs[:] = sorted(name for name in dirs if name not in (".git", "build"))
        for name in sorted(files):
            found = os.lstat(os.path.join(base, name))
            place = os.path.relpath(os.path.join(base, name), folder)
            digest.update(f"{place}\0{found.st_size}\0{found.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
