"""A git repository of one tag as one file: all its objects, in the order of their names. Not as a pack, whose bytes
differ between versions of git."""

import hashlib
import os
import shutil
import zlib
from pathlib import Path

from sparkinstall.errors import Problem
from sparkinstall.system import processes

_KINDS = ("blob", "commit", "tag", "tree")


def packed(mirror: Path) -> bytes:
    """Return all objects of a repository, each with a line of name, kind and size before it.

    Raises:
        Problem: git cannot read it.
    """
    argv = ("git", "-C", str(mirror), "cat-file", "--batch-all-objects", "--batch")
    code, out, said = processes.answer(argv, {**os.environ, "LC_ALL": "C.UTF-8"}, 120)
    if code:
        why = said.decode(errors="replace").strip()
        raise Problem(f"{mirror} cannot be read", cause=why, hint=f"delete it: `rm -r {mirror}`")
    return out


def unpack(content: bytes, mirror: Path, tag: str, commit: str) -> None:
    """Create the repository `mirror` with these objects, whose `tag` is that commit; it appears by one rename.

    The names are computed from the contents: what is at `commit` in it is what upstream has there.

    Raises:
        ValueError: the content was not written by `packed`, or lacks the commit.
    """
    waiting = mirror.with_suffix(".new")
    shutil.rmtree(waiting, ignore_errors=True)
    for folder in ("objects", "refs/heads", "refs/tags"):
        (waiting / folder).mkdir(parents=True)
    tagged, names = commit, set()
    for kind, data in _objects(content):
        whole = f"{kind} {len(data)}\0".encode() + data
        name = hashlib.sha1(whole, usedforsecurity=False).hexdigest()
        path = waiting / "objects" / name[:2] / name[2:]
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(zlib.compress(whole, 1))
        names.add(name)
        if kind == "tag" and data.startswith(f"object {commit}\n".encode()):
            tagged = name
    if commit not in names:
        raise ValueError(f"it lacks the commit {commit}")
    # The history before the commit was never downloaded.
    (waiting / "shallow").write_text(f"{commit}\n")
    (waiting / "config").write_text("[core]\n\trepositoryformatversion = 0\n\tbare = true\n")
    (waiting / "refs/tags" / tag).write_text(f"{tagged}\n")
    (waiting / "HEAD").write_text(f"{commit}\n")
    shutil.rmtree(mirror, ignore_errors=True)
    waiting.rename(mirror)


def _objects(content: bytes) -> "list[tuple[str, bytes]]":
    found, at = [], 0
    while at < len(content):
        line, newline, _ = content[at : at + 100].partition(b"\n")
        words = line.decode(errors="replace").split(" ")
        if not newline or len(words) != 3 or words[1] not in _KINDS or not words[2].isascii() or not words[2].isdigit():
            raise ValueError("it is no list of objects")
        at += len(line) + 1
        data = content[at : at + int(words[2])]
        at += len(data) + 1
        if len(data) < int(words[2]) or content[at - 1 : at] != b"\n":
            raise ValueError("it is cut")
        found.append((words[1], data))
    return found
