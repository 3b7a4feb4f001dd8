"""Models: bring one from the hub, or from another node, into the hub's cache; list, verify and remove what is there."""

import os
import pwd
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from msgspec import Struct, field
from msgspec.structs import replace

from sparkinstall.core.model_cache import ModelFolder, Revision, folders
from sparkinstall.downloads import NotDownloaded, fetch, in_parallel, kept_when_interrupted
from sparkinstall.errors import BadUsage, Blocked, CommandFailed, Problem, Storage, storage_errors
from sparkinstall.events import Tell, seldom
from sparkinstall.models import listing
from sparkinstall.models.hub import authorization, cache_folder, is_name
from sparkinstall.models.listing import HubFile, Listing
from sparkinstall.recipes import serve_options
from sparkinstall.recipes.catalogue import shipped
from sparkinstall.schema import nearest, show
from sparkinstall.system import processes

_PAUSES = (0.5, 3.0)
# An attempt that has brought this many bytes does not count: the next one is the first again.
_ADVANCE = 1 << 20
_PIECE = 1 << 20


class Dialog(Struct, frozen=True):
    """How a use case talks to the terminal: bytes so far and their total; a sentence."""

    on_bytes: Tell
    say: Callable[[str], None]


class Origin(Struct, frozen=True):
    """Where the files of a model are downloaded from.

    Attributes:
        address: that of a file.
        authorization, fingerprint: as in `fetch`.
        explained: what a failed download means there.
    """

    address: Callable[[HubFile], str]
    authorization: str
    explained: Callable[[NotDownloaded], Problem]
    fingerprint: str = ""


class Pulled(Struct, frozen=True):
    """Result of `models pull`: the snapshot, its size in bytes, and what of it this run has downloaded.

    `recipe`: the one that was named, or empty; `draft`: the model that drafts in it, which was pulled too.
    """

    model: str
    revision: str
    commit: str
    path: str
    size: int
    files: int
    fetched: int
    fetched_files: int
    recipe: str = ""
    draft: "Pulled | None" = None


class ListedModel(Struct, frozen=True):
    """A model in the cache: what it takes on the disk, and how much of that are parts of files."""

    id: str
    size: int
    arriving: int
    revisions: Sequence[Revision]


class ModelList(Struct, frozen=True):
    """Result of `models list`."""

    folder: str
    size: int
    models: Sequence[ListedModel]


class DamagedBlob(Struct, frozen=True):
    """A blob whose content does not have the hash that is its name, and the model's files that it was."""

    model: str
    blob: str
    files: Sequence[str]


class Incomplete(Struct, frozen=True):
    """A snapshot of which files are missing."""

    model: str
    commit: str
    missing: Sequence[str]


class ModelsVerified(Struct, frozen=True):
    """Result of `models verify`. `unknown`: snapshots without a list of their files, as MODEL@COMMIT.

    `unchecked`: blobs whose name is not a hash.
    """

    checked: int
    size: int
    damaged: Sequence[DamagedBlob]
    incomplete: Sequence[Incomplete]
    unknown: Sequence[str]
    unchecked: Sequence[str]


class ModelRemoved(Struct, frozen=True):
    """Result of `models remove`."""

    model: str
    path: str
    freed: int


def pull_named(name: str, revision: str | None, dialog: Dialog) -> Pulled:
    """Bring a model, or that of a shipped recipe and the one that drafts in it, into the hub's cache.

    Args:
        revision: None: the recipe's, or main.

    Raises:
        as `pull`.
    """
    recipe = next((each for each in shipped() if each.id == name), None)
    if recipe is None:
        return pull(name, revision or listing.MAIN, dialog)
    revision = revision or recipe.revision or listing.MAIN
    dialog.say(f"recipe {name}: {recipe.model} at {revision}")
    done = replace(pull(recipe.model, revision, dialog), recipe=name)
    draft = serve_options.draft_of(recipe.args)
    if draft is None or not is_name(draft.model):
        return done
    dialog.say(f"recipe {name} drafts with {draft.model}")
    return replace(done, draft=pull(draft.model, draft.revision or listing.MAIN, dialog))


def pull(model: str, revision: str, dialog: Dialog) -> Pulled:
    """Bring a model into the hub's cache, and let the revision mean it.

    Raises:
        BadUsage: a name or a variable cannot be right.
        HubRefused: the hub has no such model, or does not give it to this user.
        NotDownloaded: a file cannot be downloaded, or is not what the hub's list says. The same command resumes.
        Storage: the disk is too small, or cannot be written.
    """
    folder = ModelFolder(cache_folder(), model)
    listed = listing.listing(model, revision)
    hub = Origin(
        partial(listing.address, listed),
        authorization(),
        lambda failure: listing.refused(failure, model, revision),
    )
    fetched, files = bring(folder, listed, (revision,), hub, dialog)
    return Pulled(
        model=model,
        revision=revision,
        commit=listed.commit,
        path=str(folder.snapshot(listed.commit)),
        size=size_of(listed.files),
        files=len(listed.files),
        fetched=fetched,
        fetched_files=files,
    )


def bring(folder: ModelFolder, listed: Listing, refs: Sequence[str], origin: Origin, dialog: Dialog) -> tuple[int, int]:
    """Download what is missing of a model, then link the snapshot, and at last let the branches and tags mean it.

    Args:
        refs: names of branches and tags; the commit itself is no further one.

    Returns:
        The bytes that came, and of how many files.

    Raises:
        Blocked: the model's folder is a link.
        Problem: as `origin.explained`; what has come is kept.
        Storage: the disk is too small, or cannot be written.
    """
    require_room(folder.cache, [(folder, listed)])
    with folder.locked(lambda: dialog.say(f"another run uses {folder.model}: waiting for it")):
        missing = _missing(folder, listed)
        needed = _still_needed(folder, listed)
        folder.begin(listed)
        _announce(listed, needed, dialog)
        try:
            _Downloading(folder, origin, seldom(dialog.on_bytes)).bring(missing)
        except BaseException:
            folder.drop_if_empty()
            raise
        folder.finish(listed, refs)
    return needed, len(missing)


def size_of(files: Iterable[HubFile]) -> int:
    """Return the bytes of files, each content once."""
    return sum({file.digest: file.size for file in files}.values())


def _missing(folder: ModelFolder, listed: Listing) -> list[HubFile]:
    """Return one file for each blob that is missing."""
    by_digest = {file.digest: file for file in reversed(listed.files)}
    return [file for file in by_digest.values() if not folder.is_whole(file)]


def _still_needed(folder: ModelFolder, listed: Listing) -> int:
    missing = _missing(folder, listed)
    return size_of(missing) - sum(folder.arrived(file) for file in missing)


def _require_no_link(folder: ModelFolder) -> None:
    if folder.path.is_symlink():
        raise Blocked(f"{folder.path} is a link: what it leads to is not changed", hint="name its cache: HF_HUB_CACHE")


def require_room(cache: Path, models: Sequence[tuple[ModelFolder, Listing]]) -> None:
    """Check that all these models find room in the cache, and that this user may write there.

    Raises:
        Blocked: the folder of a model is a link.
        Storage: there is too little space, or the cache belongs to another user.
    """
    for folder, _ in models:
        require_writable(folder)
    needed = sum(_still_needed(*each) for each in models)
    with storage_errors(f"reading {cache}"):
        free = shutil.disk_usage(_nearest(cache)).free
    if needed > free:
        raise Storage(
            f"not enough space in {cache}: {_in_gb(needed)} needed, {_in_gb(free)} free",
            hint="free some space, or set HF_HUB_CACHE to a folder on a larger disk",
        )


def require_writable(folder: ModelFolder) -> None:
    """Check that this user may write to a model's folder.

    Raises:
        Blocked: it is a link.
        Storage: it, or the cache, belongs to another user.
    """
    _require_no_link(folder)
    with storage_errors(f"reading {folder.cache}"):
        place = _nearest(folder.blobs)
        owner = place.stat().st_uid
        if owner != os.geteuid() and not os.access(place, os.W_OK | os.X_OK):
            raise Storage(
                f"{place} belongs to another user ({_name_of(owner)}), so {folder.model} cannot be stored there",
                hint="run it as that user, or set HF_HUB_CACHE to a folder of your own",
            )


def _name_of(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)


def _nearest(path: Path) -> Path:
    """Return the path, or the next one above it that exists."""
    return next(each for each in (path, *path.parents) if each.exists())


def _in_gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{size / 1e6:.1f} MB"


def _announce(listed: Listing, needed: int, dialog: Dialog) -> None:
    what = f"{listed.model} at {listed.commit[:12]}: {len(listed.files)} files, {_in_gb(size_of(listed.files))}"
    dialog.say(f"{what}, of which {_in_gb(needed)} are not here yet" if needed else f"{what}, all here")


class _Downloading(Struct):
    """The downloads of a model's files, with their progress as one."""

    folder: ModelFolder
    origin: Origin
    on_bytes: Tell
    _total: int = 0
    _done: dict[str, int] = field(default_factory=dict)
    _failed: bool = False
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def bring(self, files: Sequence[HubFile]) -> None:
        """Download, a few at once; the first failure ends all."""
        self._total = sum(file.size for file in files)
        self._done = {file.digest: self.folder.arrived(file) for file in files}
        with kept_when_interrupted():
            in_parallel(self._one, sorted(files, key=lambda each: -each.size), self._stop, processes.refuse_if_stopped)

    def _stop(self) -> None:
        self._failed = True

    def _one(self, file: HubFile) -> None:
        blob = self.folder.blobs / file.digest
        if not self.folder.is_whole(file):
            # It has another size, because a power loss or another program cut it.
            with storage_errors(f"removing {blob}"):
                blob.unlink(missing_ok=True)
        pauses = list(_PAUSES)
        while True:
            before = self._done[file.digest]
            try:
                self._fetch(file, blob)
                return
            except NotDownloaded as failure:
                if self._done[file.digest] >= before + _ADVANCE:
                    pauses = list(_PAUSES)
                if not failure.again or self._failed or not pauses:
                    raise self.origin.explained(failure) from failure
                time.sleep(pauses.pop(0))

    def _fetch(self, file: HubFile, blob: Path) -> None:
        def tell(done: int, total: int) -> None:
            self._tell(file, done if total else self._done[file.digest])

        fetch(
            self.origin.address(file),
            blob,
            tell,
            authorization=self.origin.authorization,
            fingerprint=self.origin.fingerprint,
            known=self.folder.known(file),
        )
        self._tell(file, file.size)

    def _tell(self, file: HubFile, done: int) -> None:
        processes.refuse_if_stopped()
        if self._failed:
            raise CommandFailed("another download failed")
        with self._guard:
            self._done[file.digest] = done
            self.on_bytes(sum(self._done.values()), self._total)


def listed() -> ModelList:
    """Return what models are in the cache.

    Raises:
        Storage: it cannot be read.
    """
    cache = cache_folder()
    with storage_errors(f"reading {cache}"):
        models = [_listed(each) for each in folders(cache)]
    return ModelList(str(cache), sum(each.size for each in models), models)


def _listed(folder: ModelFolder) -> ListedModel:
    return ListedModel(folder.model, folder.bytes(), folder.arriving(), folder.revisions())


def verify(model: str | None, dialog: Dialog) -> ModelsVerified:
    """Read the blobs of one model or of all, remove those that are damaged, and name what is missing. No network.

    Raises:
        BadUsage: the model is not in the cache.
        Storage: the cache cannot be read, or a damaged blob not be removed.
    """
    chosen = [folder_of(model)] if model else folders(cache_folder())
    with storage_errors(f"reading {cache_folder()}"):
        blobs = [(folder, blob, blob.stat().st_size) for folder in chosen for blob in folder.all_blobs()]
        total = sum(size for _, _, size in blobs)
        reading = _Reading(seldom(dialog.on_bytes), total)
        revisions = [(folder.model, each) for folder in chosen for each in folder.revisions()]
        damaged = [_removed(folder, blob, dialog) for folder, blob, size in blobs if not reading.is_right(blob, size)]
    return ModelsVerified(
        checked=len(blobs),
        size=total,
        damaged=damaged,
        incomplete=[Incomplete(name, each.commit, each.missing) for name, each in revisions if each.complete is False],
        unknown=[f"{name}@{each.commit}" for name, each in revisions if each.complete is None],
        unchecked=[f"{folder.model}: {name}" for folder in chosen for name in folder.unchecked()],
    )


class _Reading(Struct):
    """The blobs that are read, with their progress as one."""

    on_bytes: Tell
    total: int
    _done: int = 0

    def is_right(self, blob: Path, size: int) -> bool:
        """Return whether the content has the hash that is its name."""
        hasher = listing.hasher(blob.name, size)()
        with open(blob, "rb") as file:
            while content := file.read(_PIECE):
                hasher.update(content)
                self._done += len(content)
                self.on_bytes(self._done, self.total)
        return hasher.hexdigest() == blob.name


def _removed(folder: ModelFolder, blob: Path, dialog: Dialog) -> DamagedBlob:
    files = folder.users(blob)
    with folder.locked(lambda: dialog.say(f"another run uses {folder.model}: waiting for it")):
        blob.unlink(missing_ok=True)
    return DamagedBlob(folder.model, blob.name, files)


def remove(model: str, agree: Callable[[ListedModel, Path], None], dialog: Dialog) -> ModelRemoved:
    """Remove a model from the cache, with all its revisions.

    Args:
        agree: is given what would be removed; raises if it is to stay.

    Raises:
        BadUsage: the model is not in the cache.
        Blocked: its folder is a link to another place.
        Storage: it cannot be removed.
    """
    folder = folder_of(model)
    _require_no_link(folder)
    with storage_errors(f"reading {folder.path}"):
        found = _listed(folder)
    agree(found, folder.path)
    with folder.locked(lambda: dialog.say(f"another run uses {model}: waiting for it")):
        folder.remove()
    return ModelRemoved(model, str(folder.path), found.size)


def folder_of(model: str) -> ModelFolder:
    """Return the folder of a model in the cache.

    Raises:
        BadUsage: the model is not there.
    """
    listing.require_model(model)
    folder = ModelFolder(cache_folder(), model)
    if not folder.exists():
        known = [each.model for each in folders(folder.cache)]
        hint = nearest(model, known) or "`sparkinstall models list` shows what is there"
        raise BadUsage(f"there is no model {show(model)} in {folder.cache}", hint=hint)
    return folder
