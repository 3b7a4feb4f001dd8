"""Snapshots of models that go from one cache of the hub to another: to other nodes, and in bundles."""

from collections.abc import Sequence

import msgspec
from msgspec import Struct

from sparkinstall import schema
from sparkinstall.core.model_cache import ModelFolder
from sparkinstall.errors import BadUsage, Problem
from sparkinstall.models import ModelError, listing
from sparkinstall.models.hub import cache_folder
from sparkinstall.models.listing import HubFile, Listing, Sha1


class Snapshot(Struct, frozen=True):
    """A model at a commit, the branches and tags that mean it, and its files."""

    model: str
    commit: Sha1
    refs: tuple[str, ...]
    files: tuple[HubFile, ...]

    @property
    def name(self) -> str:
        return f"{self.model}@{self.commit}"

    @property
    def folder(self) -> ModelFolder:
        """The model's folder in this user's cache."""
        return ModelFolder(cache_folder(), self.model)

    @property
    def listing(self) -> Listing:
        return Listing(self.model, self.commit, self.files)

    def is_whole(self) -> bool:
        """Return whether it is in this user's cache, with all files."""
        revisions = self.folder.revisions()
        linked = any(each.commit == self.commit and each.complete is not False for each in revisions)
        return linked and all(map(self.folder.is_whole, self.files))


def whole(folder: ModelFolder) -> list[Snapshot]:
    """Return the complete snapshots of a model whose files are named after their hashes."""
    complete = (each for each in folder.revisions() if each.complete is not False)
    some = ((each, folder.listing(each.commit) or folder.linked(each.commit)) for each in complete)
    return [
        Snapshot(folder.model, each.commit, tuple(each.refs), listed.files)
        for each, listed in some
        if listed and all(map(folder.is_whole, listed.files))
    ]


def not_whole(folder: ModelFolder) -> ModelError:
    """Return the error of a model that has no complete snapshot, with the files that are missing."""
    missing = sorted({path for each in folder.revisions() for path in each.missing})
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    why = f"{', '.join(missing[:3])}{more} missing" if missing else "it has files that are not named after their hash"
    hint = f"`sparkinstall models pull {folder.model}` completes it"
    return ModelError(f"{folder.model} is not complete here", cause=why, hint=hint)


class Unusable(Problem):
    """A list of snapshots from elsewhere cannot be used; its message is only the reason."""


def understood(content: bytes) -> Sequence[Snapshot]:
    """Read a list of snapshots, which is input as hostile as the hub's.

    Raises:
        Unusable: it is none, or names what no cache may have.
    """
    try:
        found = schema.read_json(tuple[Snapshot, ...], content, "the list of models")
        for each in found:
            listing.require_model(each.model)
            for name in each.refs:
                listing.require_revision(name)
    except (schema.Malformed, BadUsage) as error:
        raise Unusable(error.message) from error
    if why := next((why for each in found if (why := listing.unusable(each.files))), ""):
        raise Unusable(why)
    return found


def encoded(snapshots: Sequence[Snapshot]) -> bytes:
    """Return the list that `understood` reads; the same snapshots give the same bytes."""
    ordered = [
        msgspec.structs.replace(
            each, refs=tuple(sorted(each.refs)), files=tuple(sorted(each.files, key=lambda file: file.path))
        )
        for each in snapshots
    ]
    return msgspec.json.encode(ordered)
