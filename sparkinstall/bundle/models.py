"""Models in a bundle: the files of a snapshot by their hashes, and a list of which file of the model each is."""

import fcntl
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from msgspec import Struct, field

from sparkinstall.bundle import contents
from sparkinstall.core import models
from sparkinstall.core.model_cache import ModelFolder
from sparkinstall.core.model_snapshots import Snapshot, Unusable, encoded, understood, whole
from sparkinstall.core.models import Dialog
from sparkinstall.errors import BadBundle, BadUsage
from sparkinstall.models import listing
from sparkinstall.models.hub import cache_folder
from sparkinstall.payloads.bundle_archive import Content, Manifest, Member

_COMMIT = re.compile(r"[0-9a-f]{40}")
_PART = 1 << 20
_ABANDONED = re.compile(r"[0-9a-f]{40,64}\.\d+\.incomplete")


def require_names(words: tuple[str, ...]) -> None:
    """Raise BadUsage unless all are ORG/NAME or ORG/NAME@REVISION, each model once."""
    names = [word.partition("@")[0] for word in words]
    for word, name in zip(words, names, strict=True):
        listing.require_model(name)
        if "@" in word:
            listing.require_revision(word.partition("@")[2])
        if names.count(name) > 1:
            raise BadUsage(f"the model {name} is named twice", hint="a bundle has one revision of a model")


def brought(word: str, dialog: Dialog) -> Snapshot:
    """Return the snapshot of ORG/NAME or ORG/NAME@REVISION, pulled into the cache unless that commit is there.

    Raises:
        HubRefused, NotDownloaded, Storage: as `models.pull`.
    """
    model, _, revision = word.partition("@")
    folder = ModelFolder(cache_folder(), model)
    there = whole(folder) if _COMMIT.fullmatch(revision) else []
    commit = next((each.commit for each in there if each.commit == revision), "")
    refs: tuple[str, ...] = ()
    if not commit:
        commit = models.pull(model, revision or listing.MAIN, dialog).commit
        refs = () if revision == commit else (revision or listing.MAIN,)
    (found,) = (each for each in whole(folder) if each.commit == commit)
    return Snapshot(model, commit, refs, found.files)


def members(snapshot: Snapshot) -> Mapping[str, Content]:
    """Return the contents of a bundle that a snapshot is, by their paths."""
    place, blobs = contents.model_folder(snapshot.model), snapshot.folder.blobs
    return {
        f"{place}/{snapshot.commit}.json": encoded([snapshot]),
        **{f"{place}/blobs/{each.digest}": blobs / each.digest for each in snapshot.files},
    }


def known_hashes(snapshot: Snapshot) -> Mapping[str, str]:
    """Return the sha256 of those contents whose name it is."""
    place = contents.model_folder(snapshot.model)
    return {f"{place}/blobs/{each.sha256}": each.sha256 for each in snapshot.files if each.sha256}


def lacking(manifest: Manifest) -> list[str]:
    """Return the models of which neither the bundle nor the cache has all files, because it updates another bundle."""
    folders = {contents.model_folder(name): name for name in map(_name, manifest.models)}
    kept = [each for each in manifest.kept if each.path.startswith(f"{contents.MODELS}/")]
    return sorted({folders[_folder(each)] for each in kept if _size(_blob(each, folders)) != each.size})


class Unpacking(Struct):
    """Brings the models of a bundle into this user's cache of the hub."""

    bundle: Path
    manifest: Manifest
    _lists: list[bytes] = field(default_factory=list)

    def place(self, member: Member) -> Callable[[Member], AbstractContextManager[BinaryIO]] | None:
        """Return where a member of the folder of models goes; None: it is there."""
        if member.path.endswith(".json"):
            return None if self._is_there(member) else self._list
        return None if _size(_blob(member, self._folders)) == member.size else self._file

    @property
    def _folders(self) -> Mapping[str, str]:
        return {contents.model_folder(name): name for name in map(_name, self.manifest.models)}

    def _is_there(self, member: Member) -> bool:
        folder = ModelFolder(cache_folder(), self._folders[_folder(member)])
        return any(each.commit == member.name.removesuffix(".json") for each in whole(folder))

    def require_writable(self) -> None:
        """Raise Storage or Blocked if this user's cache cannot take the models. Remove parts that a killed run left."""
        for name in self._folders.values():
            folder = ModelFolder(cache_folder(), name)
            models.require_writable(folder)
            _remove_abandoned(folder.blobs)

    def finish(self) -> None:
        """Link the snapshots, whose files are all there, and at last let the branches and tags mean them.

        Raises:
            BadBundle: a list is not that of a model in the manifest, or names a file that did not come.
            Storage: the cache cannot be written.
        """
        for content in self._lists:
            for each in self._understood(content):
                with each.folder.locked(lambda: None):
                    each.folder.begin(each.listing)
                    each.folder.finish(each.listing, each.refs)

    def _understood(self, content: bytes) -> Sequence[Snapshot]:
        try:
            found = understood(content)
        except Unusable as error:
            raise self._bad(f"the list of a model's files is refused: {error.message}") from error
        for each in found:
            if each.name not in self.manifest.models:
                raise self._bad(f"it lists the files of another model, {each.name}")
            if lost := [file.path for file in each.files if not each.folder.is_whole(file)]:
                raise self._bad(f"it does not have {lost[0]} of {each.model}")
        return found

    def _bad(self, why: str) -> BadBundle:
        return BadBundle(f"the bundle {self.bundle} cannot be used: {why}", hint="do not use it")

    @contextmanager
    def _list(self, member: Member) -> Iterator[BinaryIO]:
        del member
        content = BytesIO()
        yield content
        self._lists.append(content.getvalue())

    @contextmanager
    def _file(self, member: Member) -> Iterator[BinaryIO]:
        blob = _blob(member, self._folders)
        blob.parent.mkdir(parents=True, exist_ok=True)
        part = blob.with_name(f"{blob.name}.{os.getpid()}.incomplete")
        try:
            with open(part, "wb") as out:
                _is_alone(out)
                yield out
                out.flush()
                os.fsync(out.fileno())
            # Of a name that is a sha256 the manifest's own hash is the same.
            if len(blob.name) != len(member.sha256) and not _has_its_hash(part, blob.name):
                raise self._bad(f"{member.path} does not have the hash that is its name")
            part.replace(blob)
        finally:
            part.unlink(missing_ok=True)


def _remove_abandoned(blobs: Path) -> None:
    """Remove the parts of files whose run has ended without removing them, as after SIGKILL."""
    for each in blobs.iterdir() if blobs.is_dir() else ():
        if not _ABANDONED.fullmatch(each.name) or each.is_symlink():
            continue
        with suppress(OSError), open(each, "rb") as part:
            if _is_alone(part):
                each.unlink()


def _is_alone(part: BinaryIO) -> bool:
    """Lock a part until it is closed; whether no other run has it, False also where files cannot be locked."""
    try:
        fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _name(listed: str) -> str:
    return listed.partition("@")[0]


def _folder(member: Member) -> str:
    return "/".join(member.path.split("/")[:2])


def _blob(member: Member, folders: Mapping[str, str]) -> Path:
    """Return where a file of a model is in this user's cache."""
    return ModelFolder(cache_folder(), folders[_folder(member)]).blobs / member.name


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _has_its_hash(path: Path, digest: str) -> bool:
    hasher = listing.hasher(digest, path.stat().st_size)()
    with open(path, "rb") as file:
        while content := file.read(_PART):
            hasher.update(content)
    return hasher.hexdigest() == digest
