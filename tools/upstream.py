"""Report upstream changes since the locks and patches were written: a maintainer's tool, run from the root.

    PYTHONPATH=. python tools/upstream.py

Its result depends on the current package index, so it is no test: does the resolver still generate each lock byte for
byte, does `patches/patches.yaml` list the newest vLLM, and is there a stack of it? Nothing is written.

Exit codes: 0 nothing is new; 3 changes, one line each on stdout; 1 the index cannot be reached.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from sparkinstall.assets import asset
from sparkinstall.patches import PatchSet, UnknownContent, load
from sparkinstall.stacks import StackError, names
from sparkinstall.stacks import load as load_stack
from tests.support.wheel_member import Unavailable, newest_release, wheel_member
from tools.lock import stale

NEWS, FAILED = 3, 1
LOCKED = (*names(), "tests/lab/stacks/lab-full.yaml")


def main() -> int:
    """Print each change; return the exit code."""
    try:
        news = [*stale_locks(LOCKED), *news_of_vllm(newest_release())]
    except (StackError, Unavailable) as failure:
        print(failure, file=sys.stderr)
        return FAILED
    print("\n".join(news) or "nothing is new")
    return NEWS if news else 0


def stale_locks(stacks: Iterable[str]) -> Iterator[str]:
    """Yield locks that the resolver generates differently today. Raises StackError if uv finds no solution."""
    for name in stacks:
        for lock in stale(load_stack(name)):
            yield f"{lock.name}: the resolver makes another lock today (tools/lock.py {name})"


def news_of_vllm(newest: str) -> Iterator[str]:
    """Yield what the newest vLLM requires. Raises Unavailable if the index lacks the files that the patches change."""
    for patch in load(asset("patches")):
        yield from unlisted_release(patch, newest, wheel_member(newest, patch.target))
    if newest not in names():
        yield f"vLLM {newest}: no shipped stack has it"


def unlisted_release(patch: PatchSet, newest: str, content: bytes) -> Iterator[str]:
    """Yield the newest vLLM if the patch does not list the `content` of its target file."""
    try:
        variant = patch.known(content)
    except UnknownContent:
        yield f"vLLM {newest}: {patch.target} has changed; {patch.name} needs a new variant"
        return
    if newest not in variant.releases:
        yield f"vLLM {newest}: its file is that of {variant.releases[-1]}; add it to patches/patches.yaml"


if __name__ == "__main__":
    raise SystemExit(main())
