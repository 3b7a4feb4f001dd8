"""Small bundles for tests, whole and damaged, and a machine that makes bundles."""

from __future__ import annotations

import hashlib
import io
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparkinstall import __version__
from sparkinstall.cluster import bootstrap
from sparkinstall.payloads import bundle_archive
from sparkinstall.payloads.bundle_archive import Manifest, Member, header, sha256, silent
from tests.support.rehearsals import envelope, output_of, sparkinstall
from tests.support.tiny_stack import no_index

HERE = platform.machine()
OTHER = {"x86_64": "aarch64", "aarch64": "x86_64"}[HERE]
WHEEL = ("--set", "nccl.mode=wheel")

Run = subprocess.CompletedProcess[str]

FILES = {
    "nccl/nccl-v2.28.9-1.objects": b"objects",
    "sparkinstall/README.md": b"read me\n",
    "sparkinstall/install.sh": b"#!/bin/sh\n",
    "tool/tool-1.0-py3-none-any.whl": b"t" * 512,
    "wheels/empty-1.0-py3-none-any.whl": b"",
    f"wheels/{'long' * 25}-1.0-py3-none-any.whl": b"long",
    f"wheels/vllm-0.18.1-cp38-abi3-manylinux_2_31_{HERE}.whl": b"v" * 700,
}


def manifest(files: Mapping[str, bytes] = FILES, **more: object) -> Manifest:
    """The manifest of a bundle with these files."""
    members = tuple(Member(path, len(content), sha256(content)) for path, content in sorted(files.items()))
    plain = Manifest(__version__, "tiny", HERE, "3.12", 1, members, {"git": ""})
    return replace(plain, **more)  # type: ignore[arg-type]


def packed(files: Mapping[str, bytes] = FILES, **more: object) -> bytes:
    """A whole bundle."""
    out = io.BytesIO()
    bundle_archive.write(out, manifest(files, **more), files, silent)
    return out.getvalue()


def forged(of: Manifest, behind: bytes) -> bytes:
    """A bundle with any manifest, of which the digest is right, and any bytes behind it."""
    text = of.encoded()
    own = {"manifest.json": text, "manifest.sha256": f"{sha256(text)}  manifest.json\n".encode()}
    return b"".join(block(path, content) for path, content in own.items()) + behind


def block(path: str, content: bytes) -> bytes:
    """A member as it is in the archive."""
    return header(path, len(content)) + content + bytes(-len(content) % 512)


def written(folder: Path, content: bytes, name: str = "bundle.tar") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


class Maker:
    """A machine with a network, on which bundles are made: the index is a folder with the stack's wheels.

    `platform`: of the bundles. Debian packages are for this machine's architecture only, and need a network, as
    `real_tool` does: the tool's own packages.
    """

    def __init__(
        self, folder: Path, stack: Path, cache: str = "cache", platform: str = OTHER, real_tool: bool = False
    ) -> None:
        self.stack, self.platform, self.cache = stack, platform, folder / cache
        self.env = {**no_index(stack), "XDG_CACHE_HOME": str(self.cache), "HOME": str(folder)}
        if not real_tool:
            self._add_tool_wheels()

    def _add_tool_wheels(self) -> None:
        lock = hashlib.sha256((bootstrap.sources()["requirements.lock"]).read_bytes()).hexdigest()[:16]
        for python in ("3.11", "3.12", "3.13"):
            folder = self.cache / "sparkinstall/own-packages" / f"{lock}-{python}-{self.platform}"
            folder.mkdir(parents=True)
            (folder / "tool-1.0-py3-none-any.whl").write_bytes(b"wheel")

    def create(self, to: Path, *more: str | Path, settings: tuple[str, ...] = WHEEL) -> Run:
        options = ("--stack", self.stack, "--platform", self.platform, "--output", to, *settings, *more)
        return sparkinstall("bundle", "create", *options, "--json", **self.env)

    def created(self, to: Path, *more: str | Path, settings: tuple[str, ...] = WHEEL) -> dict[str, Any]:
        run = self.create(to, *more, settings=settings)
        assert run.returncode == 0, output_of(run)
        return dict(envelope(run)["data"])
