"""Models in a cache of the hub, as the hub's own client leaves them."""

import json
from collections.abc import Mapping
from pathlib import Path

from tests.support.model_hub import COMMIT, digest, git_sha1

MODEL = "org/tiny-model"
FOLDER = "models--org--tiny-model"
BIG, OTHER = bytes(range(256)) * 12_000, b"other" * 200_000
FILES = {"config.json": b"{}", "a.safetensors": BIG, "b.safetensors": OTHER, "deep/er/same.json": b"{}", "empty": b""}


def store(folder: Path, files: Mapping[str, bytes] = FILES, commit: str = COMMIT) -> None:
    """Put a model into its folder of a cache, where `main` means it, with the list of its files."""
    entries = {}
    for path, content in files.items():
        link = folder / "snapshots" / commit / path
        for place in (folder / "blobs", link.parent, folder / "refs", folder / "trees"):
            place.mkdir(parents=True, exist_ok=True)
        (folder / "blobs" / digest(content)).write_bytes(content)
        link.symlink_to("../" * (2 + path.count("/")) + f"blobs/{digest(content)}")
        large = {"lfs_sha256": digest(content), "lfs_size": len(content)} if len(digest(content)) == 64 else {}
        entries[path] = {"size": len(content), "blob_id": git_sha1(content), **large}
    (folder / "refs/main").write_text(commit)
    (folder / f"trees/{commit}.json").write_text(json.dumps({"format_version": 1, "files": entries}))
