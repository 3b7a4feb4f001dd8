"""NCCL's source for tests where its upstream repository cannot be reached: Debian's copy of the tarball.

The machine's apt configuration stays as it is: apt reads one more suite of the same mirror, with lists and cache below
the user's cache folder.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Debian sid will replace this version; then the sum (of upstream's tag v2.29.7-1) differs.
PACKAGE = "nvidia-nccl"
VERSION = "2.29.7"
SHA256 = "e67239212c395bfdb398a7519491840d06fdf6b599c299f97c7ed0109777bba1"

SOURCES = Path("/etc/apt/sources.list.d")
TIMEOUT_SECONDS = 300


def tarball() -> Path:
    """The source tarball of NCCL 2.29.7 (1.3 MB), fetched once, its sha256 checked each time.

    Raises `RuntimeError` if apt cannot download it, or downloads another version.
    """
    kept = _cache_dir() / f"{PACKAGE}_{VERSION}.orig.tar.gz"
    if not kept.is_file():
        _keep(kept)
    if (found := hashlib.sha256(kept.read_bytes()).hexdigest()) != SHA256:
        raise RuntimeError(f"{kept} has the sha256 {found}, and {SHA256} is expected")
    return kept


def _cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sparkinstall" / "tests" / "nccl"


def _keep(kept: Path) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".apt-") as work:
        found = _downloaded(Path(work))
        part = kept.with_name(f".{kept.name}.{os.getpid()}")
        part.write_bytes(found.read_bytes())
        part.rename(kept)


def _downloaded(work: Path) -> Path:
    options = _own_apt(work)
    _run("apt-get", *options, "update", cwd=work)
    _run("apt-get", *options, "source", "--download-only", "--tar-only", PACKAGE, cwd=work)
    found = [path for path in work.glob(f"{PACKAGE}_{VERSION}*.orig.tar.*") if _sum_matches(path)]
    if not found:
        brought = sorted(path.name for path in work.glob(f"{PACKAGE}_*"))
        raise RuntimeError(f"Debian sid has {brought}, not {VERSION} with the sha256 {SHA256}")
    return found[0]


def _sum_matches(path: Path) -> bool:
    return hashlib.sha256(path.read_bytes()).hexdigest() == SHA256


def _own_apt(work: Path) -> list[str]:
    """apt options for lists and cache below `work`, with Debian sid's contrib sources as the only source."""
    source = work / "sid.sources"
    source.write_text(_sid_source())
    for folder in ("lists/partial", "cache/archives/partial"):
        (work / folder).mkdir(parents=True)
    settings = {"Etc::sourcelist": source, "Etc::sourceparts": "/dev/null"}
    settings |= {"State::lists": work / "lists", "Cache": work / "cache"}
    dirs = [word for key, value in settings.items() for word in ("-o", f"Dir::{key}={value}")]
    # apt's download user may not enter a home folder, which would be a warning.
    return [*dirs, "-o", "APT::Sandbox::User=root"]


def _sid_source() -> str:
    uri, keyring = _debian_mirror()
    signed = f"Signed-By: {keyring}\n" if keyring else ""
    return f"Types: deb-src\nURIs: {uri}\nSuites: sid\nComponents: contrib\n{signed}"


def _debian_mirror() -> tuple[str, str | None]:
    """The archive that this machine installs from, and its keyring."""
    for uri, suites, keyring in _configured():
        if uri.rstrip("/").endswith("/debian") and "security" not in suites:
            return uri, keyring
    raise RuntimeError("no Debian archive in this machine's apt sources")


def _configured() -> Iterator[tuple[str, str, str | None]]:
    """(URI, suites, keyring) of every source that apt knows, in deb822 and in one-line style."""
    for path in sorted(SOURCES.glob("*.sources")):
        for stanza in re.split(r"\n\s*\n", path.read_text()):
            fields = dict(re.findall(r"^([\w-]+):[ \t]*(.*)$", stanza, re.MULTILINE))
            for uri in fields.get("URIs", "").split():
                yield uri, fields.get("Suites", ""), fields.get("Signed-By") or None
    for path in [SOURCES.parent / "sources.list", *sorted(SOURCES.glob("*.list"))]:
        lines = path.read_text() if path.is_file() else ""
        for options, uri, suite in re.findall(r"^deb(?:-src)?\s+(\[.*?\]\s+)?(\S+)\s+(\S+)", lines, re.MULTILINE):
            keyring = re.search(r"signed-by=([^\s\]]+)", options)
            yield uri, suite, keyring[1] if keyring else None


def _run(*command: str, cwd: Path) -> None:
    run = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)}: {run.stderr.strip()[-2000:]}")
