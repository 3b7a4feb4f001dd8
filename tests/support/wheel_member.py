"""One file of a published wheel, without downloading the wheel.

A vLLM wheel is 0.4 GB and a test needs 4 kB of it. A wheel is a zip, whose directory is at the end, so a few HTTP range
requests are enough. If the index ignores ranges, the whole wheel is downloaded, and only the member is kept.

`uv` resolves the release with the index of this machine, and its answer has the wheel's address.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from http.client import HTTPResponse
from pathlib import Path
from typing import IO, Any

import pytest
from uv import find_uv_bin

# What a DGX Spark installs; DGX OS 7 is Ubuntu 24.04, hence glibc 2.39.
SPARK_PLATFORM = "aarch64-manylinux_2_39"

# The directory of a vLLM wheel is about 0.4 MB: with a block of this size it arrives in one or two requests.
BLOCK_BYTES = 1 << 19

TIMEOUT_SECONDS = 180
RETRY_SECONDS = (1, 4, 15)


class Unavailable(Exception):
    """The index cannot be reached, or has no such wheel or member."""


class NoMember(Unavailable):
    """The wheel exists and has no such file."""


def cache_dir() -> Path:
    """Where members are kept between runs: below the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sparkinstall" / "tests" / "wheels"


def wheel_member(release: str, member: str, *, package: str = "vllm", platform: str = SPARK_PLATFORM) -> bytes:
    """The bytes of `member` in the wheel of `package` `release` for `platform` (as uv names it), Python 3.12.

    Kept for good: a release's wheel never changes. zipfile has checked the member's CRC.
    Raises `Unavailable` if the index cannot be reached or has no such release or member.
    """
    kept = cache_dir() / f"{package}-{release}" / platform / member
    if not kept.is_file():
        with opened_wheel(package, release, platform) as wheel:
            try:
                _keep(kept, wheel.read(member))
            except KeyError as absent:
                raise NoMember(f"{package} {release} has no {member}") from absent
    return kept.read_bytes()


def needed_member(release: str, member: str) -> bytes:
    """As `wheel_member`. Without an index the test is skipped, or fails in CI.

    Raises `NoMember` if the wheel has no such file.
    """
    try:
        return wheel_member(release, member)
    except NoMember:
        raise
    except Unavailable as failure:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"NOT TESTED, the package index is needed: {failure}")


def source_reader(release: str, package: str = "vllm") -> Callable[[str], bytes | None]:
    """Return a function that reads members of a release's wheel, None for those that it lacks; skips like the above.

    A member is downloaded once, and so is the list of them.
    """
    listing = cache_dir() / f"{package}-{release}" / f"{SPARK_PLATFORM}.members"
    if not listing.is_file():
        try:
            with opened_wheel(package, release) as wheel:
                _keep(listing, "\n".join(wheel.namelist()).encode())
        except Unavailable as failure:
            if os.environ.get("CI"):
                raise
            pytest.skip(f"NOT TESTED, the package index is needed: {failure}")
    members = set(listing.read_text().split("\n"))
    return lambda path: needed_member(release, path) if path in members else None


def newest_release(package: str = "vllm", platform: str = SPARK_PLATFORM) -> str:
    """The newest stable release that the index has a wheel of, without a cache."""
    return str(_locked(package, platform)["version"])


@contextmanager
def opened_wheel(package: str, release: str, platform: str = SPARK_PLATFORM) -> Iterator[zipfile.ZipFile]:
    """The wheel as a zip whose bytes are downloaded when they are read. Raises `Unavailable`."""
    url = _wheel_url(package, release, platform)
    try:
        with opened_url(url) as stream, zipfile.ZipFile(stream) as wheel:
            yield wheel
    except (OSError, zipfile.BadZipFile) as failure:
        raise Unavailable(f"{package} {release}: {failure}") from failure


@cache
def _wheel_url(package: str, release: str, platform: str) -> str:
    wheels = _locked(f"{package}=={release}", platform).get("wheels")
    if not wheels:
        raise Unavailable(f"the index has no wheel of {package} {release} for {platform}")
    return str(wheels[0]["url"])


def _locked(requirement: str, platform: str) -> Mapping[str, Any]:
    """The package of a pylock that uv resolves `requirement` to, with its wheels' addresses."""
    command = [find_uv_bin(), "pip", "compile", "--quiet", "--no-deps", "--only-binary", ":all:", "--no-header"]
    # Any Python does, since nothing is built: without `--python`, uv would download 3.12.
    target = ["--python", sys.executable, "--python-version", "3.12", "--python-platform", platform]
    try:
        run = subprocess.run(
            [*command, *target, "--format", "pylock.toml", "-"],
            input=requirement,
            capture_output=True,
            text=True,
            env=client_env(),
            timeout=300,
        )
    except (OSError, subprocess.TimeoutExpired) as failure:
        raise Unavailable(f"uv could not resolve {requirement}: {failure}") from failure
    if run.returncode:
        raise Unavailable(f"uv could not resolve {requirement}: {run.stderr.strip()}")
    package: Mapping[str, Any] = tomllib.loads(run.stdout)["packages"][0]
    return package


def client_env() -> dict[str, str]:
    """The variables with which `uv` finds the index of this machine."""
    # A machine that is configured for pip only must work too, and uv does not read pip's variable.
    env = dict(os.environ)
    if "PIP_INDEX_URL" in env and not {"UV_DEFAULT_INDEX", "UV_INDEX_URL"} & env.keys():
        env["UV_DEFAULT_INDEX"] = env["PIP_INDEX_URL"]
    return env


@contextmanager
def opened_url(url: str) -> Iterator[IO[bytes]]:
    """A remote file as a stream that downloads what is read. Raises OSError."""
    with _get(url, "bytes=0-0") as first:
        total = re.fullmatch(r"bytes 0-0/(\d+)", first.headers.get("Content-Range", ""))
        if not total:
            with tempfile.TemporaryFile() as whole:
                shutil.copyfileobj(first, whole, BLOCK_BYTES)
                yield whole
                return
    yield io.BufferedReader(_Ranges(url, int(total[1])), BLOCK_BYTES)


def _get(url: str, byte_range: str) -> HTTPResponse:
    request = urllib.request.Request(url, headers={"Range": byte_range})
    for seconds in RETRY_SECONDS:
        try:
            return _answer(request)
        except urllib.error.HTTPError:
            raise
        except OSError:
            # A single name that is not resolved or connection that is refused is no failure of the index.
            time.sleep(seconds)
    return _answer(request)


def _answer(request: urllib.request.Request) -> HTTPResponse:
    response: HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    return response


class _Ranges(io.RawIOBase):
    """A remote file as a seekable stream; each read is one range request."""

    def __init__(self, url: str, size: int) -> None:
        self._url, self._size, self._at = url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        with _get(self._url, f"bytes={self._at}-{end - 1}") as response:
            data = response.read()
        # Otherwise a cut or a whole answer would count as the member's bytes.
        if response.status != 206 or len(data) != end - self._at:
            raise OSError(f"asked for {end - self._at} bytes, got {len(data)} (HTTP {response.status})")
        buffer[: len(data)] = data
        self._at = end
        return len(data)


def _keep(path: Path, data: bytes) -> None:
    # Renamed into place: two test workers may fetch the same member at once.
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as temporary:
        temporary.write(data)
    Path(temporary.name).replace(path)
