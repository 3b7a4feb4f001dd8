"""The sources of apt: which one `apt-get update` complains about, and where it is named."""

import re

from sparkinstall.system import Reader, Result

_FOLDERS = ("/etc/apt/sources.list.d", "/etc/apt")
# Warnings about a key's place, or a source that is named twice, are no failures.
_FAILED = re.compile(r"E: |W: .*(Failed to fetch|GPG error|NO_PUBKEY|not signed|signature verification)")
_NAMED = re.compile(r"[a-z+]+:/|/etc/apt/")
_URL = re.compile(r"[a-z+]+:/{1,2}[^\s'\"]+")
_FILE = re.compile(r"/etc/apt/[\w.+/-]*\w")


def complaint(updated: Result) -> str:
    """Return the line in which `apt-get update` names a source that failed, or what else failed; "" if nothing did."""
    lines = [line.strip() for line in updated.out.splitlines() if _FAILED.match(line.strip())]
    # Errors first; apt's summary of what it has said before names no source.
    found = next((line for line in sorted(lines) if _NAMED.search(line)), "")
    return (found or next(iter(lines), "" if updated.ok else f"exit code {updated.code}"))[:300]


def hint(on: Reader, complaint: str) -> str:
    """Return what to do about a source, with the file that names it if it is found."""
    files = _FILE.findall(complaint) or _naming(on, complaint)
    where = f" in {files[0]}" if files else " (`grep -rn http /etc/apt/sources.list*` shows where each is named)"
    return f"correct or remove that source{where}; `sudo apt-get update` must end without a complaint about it"


def _naming(on: Reader, complaint: str) -> list[str]:
    found = _URL.search(complaint)
    if not found:
        return []
    # "https://host/path" of "https://host/path/dists/noble/InRelease", and of "https://host/path noble Release".
    url = found[0].partition("/dists/")[0].rstrip("/").encode()
    paths = [f"{folder}/{name}" for folder in _FOLDERS for name in on.names(folder)]
    return [each for each in paths if each.endswith((".list", ".sources")) and url in (on.read(each) or b"")]
