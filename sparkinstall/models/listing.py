"""What files a model has on the hub, with their sizes and hashes; all that the hub answers is hostile input."""

import hashlib
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Annotated, Any
from urllib.parse import quote, urlsplit

from msgspec import Meta, Struct, field

from sparkinstall import schema
from sparkinstall.downloads import NotDownloaded, page
from sparkinstall.errors import BadUsage, Problem
from sparkinstall.models.hub import authorization, endpoint, token

MAIN = "main"

_MODEL = re.compile(r"(?:[A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9_][\w.+-]*(?:/[A-Za-z0-9_][\w.+-]*)*", re.ASCII)

LARGEST_ANSWER = 64 << 20
"""Bytes of a list of files."""
MOST_FILES = 50_000
_LONGEST_REVISION, _LONGEST_PATH, _LONGEST_NAME = 250, 1000, 255

Sha1 = Annotated[str, schema.like(r"[0-9a-f]{40}", "40 hexadecimal digits")]
Sha256 = Annotated[str, schema.like(r"[0-9a-f]{64}", "64 hexadecimal digits")]
_Name1 = Annotated[str, schema.like(r"(?:[0-9a-f]{40})?", "40 hexadecimal digits, or nothing")]
_Name256 = Annotated[str, schema.like(r"(?:[0-9a-f]{64})?", "64 hexadecimal digits, or nothing")]
Size = Annotated[int, Meta(ge=0, le=1 << 50, title="a number of bytes")]


class HubRefused(Problem):
    """The hub has no such model or revision, or does not give it to this user."""

    code = "hub"


class HubFile(Struct, frozen=True):
    """A file of a model: its path, size in bytes and git's name for it; a large one also has a sha256.

    `blob_id` is "" for a large one if only the cache of an older client is known.
    """

    path: str
    size: Size
    blob_id: _Name1
    sha256: _Name256 = ""

    @property
    def digest(self) -> str:
        """The hash of the content, which is the name of its blob in the cache."""
        return self.sha256 or self.blob_id


class Listing(Struct, frozen=True):
    """The files that a model has at a commit."""

    model: str
    commit: str
    files: tuple[HubFile, ...]


def hasher(digest: str, size: int) -> "Callable[[], hashlib._Hash]":
    """Return the start of the hash that `digest` is of: a sha256, or git's sha1 of a file with `size` bytes."""
    if len(digest) == 64:
        return hashlib.sha256
    # Of a name, not of a secret.
    return partial(hashlib.sha1, b"blob %d\0" % size, usedforsecurity=False)


# --- names


def require_model(name: str) -> None:
    """Raise BadUsage unless `name` is that of a model on the hub."""
    if not _MODEL.fullmatch(name) or "--" in name or ".." in name or name.endswith((".git", ".ipynb")):
        raise BadUsage(
            f"{schema.show(name)} is not the name of a model on the hub", hint="such as Qwen/Qwen3-0.6B, ORG/NAME"
        )


def require_revision(name: str) -> None:
    """Raise BadUsage unless `name` can be that of a branch, a tag or a commit."""
    if not _REVISION.fullmatch(name) or ".." in name or len(name) > _LONGEST_REVISION:
        raise BadUsage(f"{schema.show(name)} is not the name of a revision", hint="a branch, a tag or a commit")


def complaint(path: str) -> str:
    """Return why a path from the hub is not used, or "" if it stays below the folder that it is put in."""
    if len(path) > _LONGEST_PATH:
        return "it is too long"
    if any(unicodedata.category(each) in ("Cc", "Cf", "Cs", "Zl", "Zp") for each in path):
        return "it has a character that is not printable"
    names = path.split("/")
    if any(name in ("", ".", "..") for name in names):
        return "it leads out of the model's folder, or is no path"
    return "" if all(len(name.encode()) <= _LONGEST_NAME for name in names) else "a name in it is too long"


def require_files(files: Iterable[HubFile]) -> str:
    """Return why a list of files is not used, or ""."""
    found: set[str] = set()
    folders: set[str] = set()
    for file in files:
        if why := complaint(file.path):
            return f"{schema.show(file.path)}: {why}"
        if file.path in found:
            return f"{schema.show(file.path)} is there twice"
        found.add(file.path)
        folders |= set(_parents(file.path))
    both = sorted(found & folders)
    return f"{schema.show(both[0])} is a file and a folder" if both else ""


def _parents(path: str) -> Iterable[str]:
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path


# --- the hub's answers


class _Large(Struct):
    sha256: Sha256
    size: Size


class _Sibling(Struct):
    rfilename: str
    size: Size
    blob_id: Sha1 = field(name="blobId")
    lfs: _Large | None = None


class _Info(Struct):
    sha: Sha1
    siblings: list[_Sibling]


def listing(model: str, revision: str) -> Listing:
    """Ask the hub for the files of a model, and for the commit that a branch or tag is at.

    Raises:
        HubRefused: there is no such model or revision, or this user may not have it.
        NotDownloaded: the hub cannot be reached, or its answer cannot be used.
        BadUsage: one of the names cannot be right.
    """
    require_model(model)
    require_revision(revision)
    url = f"{endpoint()}/api/models/{quote(model)}/revision/{quote(revision, safe='')}?blobs=true"
    try:
        answer = page(url, LARGEST_ANSWER, authorization=authorization())
    except NotDownloaded as failure:
        if failure.kind == "network":
            failure.message = f"the hub {endpoint()} cannot be reached"
            failure.hint = "check the network and HF_ENDPOINT, and run the same command again"
        raise refused(failure, model, revision) from failure
    try:
        info = schema.read_json(_Info, answer, "the hub's list of files")
    except schema.Malformed as error:
        raise _unusable(url, error.message) from error
    files = tuple(map(_file, info.siblings))
    if why := unusable(files):
        raise _unusable(url, why)
    if re.fullmatch(r"[0-9a-f]{40}", revision) and revision != info.sha:
        raise _unusable(url, f"it is of another commit, {info.sha}")
    return Listing(model, info.sha, files)


def _file(of: _Sibling) -> HubFile:
    if of.lfs:
        return HubFile(of.rfilename, of.lfs.size, of.blob_id, of.lfs.sha256)
    return HubFile(of.rfilename, of.size, of.blob_id)


def unusable(files: tuple[HubFile, ...]) -> str:
    """Return why a list of a model's files from elsewhere is not used, or ""."""
    if why := require_files(files):
        return why
    if not files:
        return "the model has no file"
    if not all(file.digest for file in files):
        return "a file has no hash"
    if len(files) > MOST_FILES:
        return f"the model has more than {MOST_FILES} files"
    sizes: dict[str, int] = {}
    for file in files:
        if sizes.setdefault(file.digest, file.size) != file.size:
            return f"{schema.show(file.path)} has the hash of a file of another size"
    return ""


def _unusable(url: str, why: str) -> NotDownloaded:
    hint = "nothing was downloaded; check that HF_ENDPOINT is a hub" if os.environ.get("HF_ENDPOINT") else ""
    failure = NotDownloaded(
        "the hub's list of files cannot be used", cause=why, hint=hint or "nothing was downloaded; try again later"
    )
    failure.url, failure.kind = url, "server"
    return failure


def address(listed: Listing, file: HubFile) -> str:
    """Return from where a file is downloaded."""
    return f"{endpoint()}/{quote(listed.model)}/resolve/{listed.commit}/{quote(file.path)}"


def refused(failure: NotDownloaded, model: str, revision: str) -> Problem:
    """Return what a failed download means, if the hub's answer says it; else the failure itself."""
    page_of = f"{endpoint()}/{model}"
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    gated = failure.reason == "GatedRepo" or failure.status == 403
    if failure.status in (401, 403) and not authorization():
        if urlsplit(endpoint()).scheme == "http" and token():
            log_in = "your token is not sent without TLS: HF_ENDPOINT must begin with https://"
        what = f"{model} is gated" if gated else f"the hub does not give {model} to a user without a login"
        why = "" if gated else "it does not exist, is private, or is gated"
        return HubRefused(what, cause=why, hint=f"open {page_of} in a browser and accept its terms; then {log_in}")
    if gated:
        hint = f"ask for access at {page_of}, wait until it is granted, and check that your token may read gated models"
        return HubRefused(f"your login may not download {model}", cause=failure.cause, hint=hint)
    if failure.status == 401:
        return HubRefused("the hub does not accept your token", cause=failure.cause, hint=f"{log_in} again")
    if failure.status == 404 and failure.reason == "RevisionNotFound":
        return HubRefused(f"{model} has no revision {revision}", hint=f"{page_of} lists its branches and tags")
    if failure.status == 404 and failure.reason in ("RepoNotFound", ""):
        hint = "check the name, and whether it is private: then your token must be able to read it"
        return HubRefused(f"there is no model {model} at {endpoint()}", hint=hint)
    return failure


# --- the list of files in the cache


class _Entry(Struct, omit_defaults=True):
    size: Size
    blob_id: Sha1
    lfs_sha256: Sha256 | None = None
    lfs_size: Size | None = None


class _Tree(Struct):
    format_version: int
    files: dict[str, _Entry]


_FORMAT = 1


def tree_of(listed: Listing) -> Mapping[str, Any]:
    """Return a list of files as the hub's own client (1.x) keeps it in its cache, to know what is missing."""
    entries = {
        file.path: _Entry(file.size, file.blob_id, file.sha256 or None, file.size if file.sha256 else None)
        for file in sorted(listed.files, key=lambda each: each.path)
    }
    return {"format_version": _FORMAT, "files": entries}


def files_of_tree(content: bytes) -> tuple[HubFile, ...] | None:
    """Return the files of such a list; None: it is damaged, or of another format."""
    try:
        tree = schema.read_json(_Tree, content, "the list of files")
    except schema.Malformed:
        return None
    files = tuple(HubFile(path, each.size, each.blob_id, each.lfs_sha256 or "") for path, each in tree.files.items())
    return files if tree.format_version == _FORMAT and not require_files(files) else None
