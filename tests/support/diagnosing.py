"""The known failures, a line of each, and logs that are diagnosed in this process."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from sparkinstall.diagnose.index import SignatureIndex, index_of
from sparkinstall.diagnose.judge import Diagnosis, judge
from sparkinstall.diagnose.search import Search
from sparkinstall.diagnose.signatures import Signature, load

REPOSITORY = Path(__file__).resolve().parents[2]
KNOWN = load()
LOOKED_FOR = index_of(KNOWN)
BY_NAME = {each.name: each for each in KNOWN}
HOST_CASES = yaml.safe_load((REPOSITORY / "tests/cases/known-hosts.yaml").read_text())


def of_rule(known: Signature) -> list[str]:
    """What the kernel's log has on a host that the rule of this name finds bad."""
    lines = {f"kernel: {line}" for case in HOST_CASES if case["rule"] == known.name for line in case.get("kernel", ())}
    kinds = [each.regex for each in KNOWN if each.family == known.name and not each.only_with]
    return sorted(line for line in lines if known.regex.search(line) and not any(kind.search(line) for kind in kinds))


LINES = {each.name: [*each.example, *of_rule(each)] for each in KNOWN}
"""What each known failure looks like in a log."""


def read(data: bytes, sizes: Sequence[int] = (1 << 20,), index: SignatureIndex = LOOKED_FOR, name: str = "x") -> Search:
    """Search a log that is fed in pieces of these sizes, repeatedly."""
    search, at = Search(index, name), 0
    while at < len(data):
        for size in sizes:
            search.feed(data[at : at + size])
            at += size
    search.end()
    return search


def diagnosed(*logs: bytes) -> Diagnosis:
    """Diagnose several logs together."""
    return judge([read(log, name=f"log {at}") for at, log in enumerate(logs)])


def causes(found: Diagnosis) -> list[str]:
    """The names of the causes."""
    return [each.name for each in found.causes]


def example(name: str) -> bytes:
    """The first line of a failure, as often as makes it one."""
    return (LINES[name][0].encode() + b"\n") * BY_NAME[name].times


def companions(known: Signature) -> bytes:
    """The lines without which a failure is none."""
    return b"".join(example(name) * BY_NAME[name].times for name in known.only_with)
