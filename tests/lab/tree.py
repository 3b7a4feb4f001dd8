"""A tree as a dictionary, to compare its states. Also a program that a node runs."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress

KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "folder",
    stat.S_IFLNK: "link",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


def tree_digest(*paths: str, exclude: Sequence[str] = (), times: bool = False) -> dict[str, str]:
    """Type, mode, owner and content of every file at and under `paths`, without leaving their filesystems.

    `exclude` takes shell patterns that match whole paths; an excluded folder is left out with all that is below.
    `times` adds the time of the last change, in nanoseconds. What is removed meanwhile is left out.
    """
    found = {}
    for path in sorted(path for start in paths for path in _walk(os.path.abspath(start), exclude)):
        with suppress(FileNotFoundError):
            found[path] = _describe(path, os.lstat(path), times)
    return found


def _walk(path: str, exclude: Sequence[str]) -> Iterator[str]:
    if any(fnmatch.fnmatchcase(path, pattern) for pattern in exclude) or not os.path.lexists(path):
        return
    yield path
    with suppress(FileNotFoundError):
        yield from _below(path, exclude)


def _below(path: str, exclude: Sequence[str]) -> Iterator[str]:
    info = os.lstat(path)
    if stat.S_ISDIR(info.st_mode):
        for entry in os.scandir(path):
            inner_folder = entry.is_dir(follow_symlinks=False)
            # Only for folders: overlayfs gives files the device number of their layer.
            if not inner_folder or entry.stat(follow_symlinks=False).st_dev == info.st_dev:
                yield from _walk(entry.path, exclude)


def _describe(path: str, info: os.stat_result, times: bool) -> str:
    kind = stat.S_IFMT(info.st_mode)
    words = [KINDS[kind], f"{stat.S_IMODE(info.st_mode):04o}", f"{info.st_uid}:{info.st_gid}"]
    if kind == stat.S_IFREG:
        words.append(_sha256(path))
    if kind == stat.S_IFLNK:
        words.append(os.readlink(path))
    if times:
        words.append(str(info.st_mtime_ns))
    return " ".join(words)


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    json.dump(tree_digest(*request["paths"], exclude=request["exclude"], times=request["times"]), sys.stdout)
