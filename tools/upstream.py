"""Report what has changed upstream since the locks and patches were made: a maintainer's tool, run from the root.

    PYTHONPATH=. python tools/upstream.py

Two questions, whose answers depend on the package index of the day and so are no test: does the resolver still make
each lock byte for byte, and is the newest vLLM one whose file `patches/patches.yaml` lists? Nothing is written.

Exit codes: 0 nothing is new; 3 something is, one line each on stdout; 1 the index could not be asked.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from sparkinstall.assets import asset
from sparkinstall.patches import PatchSet, UnknownContent, load
from sparkinstall.stacks import StackError, names
from sparkinstall.stacks import load as load_stack
from tests.support.wheel_member import Unavailable, newest_release, wheel_member
from tools.lock import remake

NEWS, FAILED = 3, 1


def main() -> int:
    """Print each piece of news; the exit code."""
    try:
        news = [*stale_locks(), *(line for patch in load(asset("patches")) for line in unlisted_release(patch))]
    except (StackError, Unavailable) as failure:
        print(failure, file=sys.stderr)
        return FAILED
    print("\n".join(news) or "nothing is new")
    return NEWS if news else 0


def stale_locks() -> Iterator[str]:
    """The locks that the resolver makes differently today. Raises StackError when uv finds no solution."""
    for name in names():
        for lock in remake(load_stack(name), check=True):
            yield f"{lock.name}: the resolver makes another lock today (tools/lock.py {name})"


def unlisted_release(patch: PatchSet) -> Iterator[str]:
    """The newest vLLM, if the patch set does not list it. Raises Unavailable when the index cannot be asked."""
    newest = newest_release()
    try:
        variant = patch.known(wheel_member(newest, patch.target))
    except UnknownContent:
        yield f"vLLM {newest}: {patch.target} has changed; {patch.name} needs a new variant"
        return
    if newest not in variant.releases:
        yield f"vLLM {newest}: its file is that of {variant.releases[-1]}; add it to patches/patches.yaml"


if __name__ == "__main__":
    raise SystemExit(main())
