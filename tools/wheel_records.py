"""Find wheels of the shipped stacks, and of the lab's, whose RECORD is wrong: a maintainer's tool, run from the root.

    PYTHONPATH=. python tools/wheel_records.py

Writes knowledge/records: hash and size of the files whose size in a wheel differs from its RECORD. Of a wheel with a
right RECORD, only its directory and its RECORD are downloaded. Needs the Python index; wheels of other addresses are
left out and named.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sparkinstall.stacks import Stack, load, names, parse_lock
from tests.support.wheel_member import client_env, opened_url
from tests.support.wheel_record import recorded_hash, recorded_sizes
from tools.lock import uv_argv

_ROOT = Path(__file__).resolve().parents[1]
RECORDS = _ROOT / "knowledge/records"
LAB_STACK = _ROOT / "tests/lab/stacks/lab-full.yaml"
_AT_ONCE = 6


def main() -> None:
    """Inspect every wheel, and write a file for each package with a wrong RECORD."""
    wheels = {url: package for name in (*names(), str(LAB_STACK)) for url, package in _wheels(load(name))}
    found: dict[str, set[tuple[str, str, str]]] = defaultdict(set)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for package, rows in zip(wheels.values(), pool.map(_wrong_rows, wheels), strict=True):
            if rows:
                found[package].update(rows)
    for package, wrong in found.items():
        text = "".join(f"{','.join(row)}\n" for row in sorted(wrong))
        (RECORDS / f"{package}.csv").write_text(text, encoding="utf-8")
    print(f"{len(wheels)} wheels; with a wrong RECORD: {', '.join(found) or 'none'}")


def _wheels(stack: Stack) -> Iterator[tuple[str, str]]:
    """Yield URL and NAME-VERSION of every wheel in the stack's locks."""
    for platform in stack.platforms.values():
        pins = parse_lock(platform.lock_text())
        if elsewhere := [pin.name for pin in pins if pin.url]:
            print(f"{stack.name}, {platform.arch}: left out: {', '.join(elsewhere)}", file=sys.stderr)
        ordinary = "".join(f"{pin.requirement}\n" for pin in pins if not pin.url)
        argv = [*uv_argv(stack, platform), "--no-deps", "-"]
        made = subprocess.run(argv, input=ordinary, check=True, capture_output=True, text=True, env=client_env()).stdout
        for package in tomllib.loads(made)["packages"]:
            for wheel in package["wheels"]:
                yield wheel["url"], f"{package['name']}-{package['version']}"


def _wrong_rows(url: str) -> list[tuple[str, str, str]]:
    with opened_url(url) as stream, zipfile.ZipFile(stream) as wheel:
        recorded = recorded_sizes(wheel)
        sizes = {each.filename: f"{each.file_size}" for each in wheel.infolist()}
        wrong = [name for name, size in recorded.items() if size and name in sizes and sizes[name] != size]
        return [(name, recorded_hash(wheel.read(name)), sizes[name]) for name in wrong]


if __name__ == "__main__":
    main()
