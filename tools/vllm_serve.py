"""List what `vllm serve` of each shipped stack takes: a maintainer's tool, run from the repository's root.

    PYTHONPATH=. python tools/vllm_serve.py            # write knowledge/vllm-serve.json
    PYTHONPATH=. python tools/vllm_serve.py --check    # write nothing; exit 1 if it differs

Reads the sources in the wheels, of which only those files are downloaded. Needs the Python index. Run it after a stack
was added or its vLLM was changed; a test compares the file with the wheels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from sparkinstall.facts import vllm
from sparkinstall.facts.vllm_options import Declared
from sparkinstall.facts.vllm_releases import FILE, grouped
from sparkinstall.stacks import load, names
from tests.support.wheel_member import opened_wheel

PATH = Path(__file__).resolve().parents[1] / "knowledge" / FILE


def main(argv: Sequence[str] | None = None) -> int:
    """Write the file, or compare it."""
    parser = argparse.ArgumentParser(description="List what `vllm serve` of each shipped stack takes.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the file differs")
    check, new = parser.parse_args(argv).check, as_text([_of_wheel(load(name).vllm) for name in names()])
    differs = not PATH.is_file() or PATH.read_text(encoding="utf-8") != new
    if differs and not check:
        PATH.write_text(new, encoding="utf-8")
    print(f"{PATH.name}: {'differs' if differs and check else 'written' if differs else 'up to date'}", file=sys.stderr)
    return int(differs and check)


def as_text(releases: Sequence[Declared]) -> str:
    """Return the content of the file."""
    encoded = msgspec.json.encode([_sparse(msgspec.to_builtins(each)) for each in grouped(releases)])
    return msgspec.json.format(encoded, indent=1).decode() + "\n"


def _sparse(group: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in group.items() if value}


def _of_wheel(release: str) -> Declared:
    with opened_wheel("vllm", release) as wheel:
        names = set(wheel.namelist())
        found = vllm.declared(lambda path: wheel.read(path) if path in names else None)
    if found is None or found.release != release:
        raise SystemExit(f"vLLM {release}: its sources are not understood")
    return found


if __name__ == "__main__":
    sys.exit(main())
