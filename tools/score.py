"""Print how many logs of the corpus `diagnose` judges right: `PYTHONPATH=. python -m tools.score`; exits 1 below all.

`tests/logs/corpus/KIND.yaml` holds small logs, each a case: `name`; `log`, or `logs` with one text per node; `line`,
the decisive line (empty: none); `cause`, the name of a failure, `unknown` (only suspicious lines, or only consequences)
or `nothing`.
"""

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from msgspec import Struct

from sparkinstall import schema
from sparkinstall.diagnose.encodings import text_of
from sparkinstall.diagnose.index import SignatureIndex, index_of
from sparkinstall.diagnose.judge import Diagnosis, judge
from sparkinstall.diagnose.search import Search
from sparkinstall.diagnose.signatures import load

CORPUS = Path(__file__).resolve().parents[1] / "tests/logs/corpus"
UNKNOWN, NOTHING = "unknown", "nothing"


class Case(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A log of the corpus, or one of each node; `source`: whose messages these are."""

    name: str
    cause: str
    log: str = ""
    logs: tuple[str, ...] = ()
    line: str = ""
    source: str = ""

    @property
    def nodes(self) -> tuple[str, ...]:
        """The log of each node."""
        return self.logs or (self.log,)


def cases() -> dict[str, tuple[Case, ...]]:
    """Return the cases of each kind."""
    return {path.stem: schema.read_file(tuple[Case, ...], path) for path in sorted(CORPUS.glob("*.yaml"))}


def diagnosed(logs: Iterable[bytes], index: SignatureIndex) -> Diagnosis:
    """Return the diagnosis of the logs of several nodes."""
    searches = []
    for at, log in enumerate(logs):
        search = Search(index, f"node {at}")
        for piece in text_of(search.name, iter([log])):
            search.feed(piece)
        search.end()
        searches.append(search)
    return judge(searches)


def answer(found: Diagnosis) -> str:
    """Return the causes found, or `UNKNOWN`, or `NOTHING`."""
    causes = " and ".join(each.name for each in found.causes)
    return causes or (UNKNOWN if found.consequences or found.telling else NOTHING)


def wrong(case: Case, found: Diagnosis) -> str:
    """Return what is wrong with the diagnosis of a case; "" if it is right."""
    if (said := answer(found)) != case.cause:
        return f"{said} instead of {case.cause}"
    shown = [place.text for each in found.causes for place in each.lines] or [each.text for each in found.telling[:1]]
    if case.line and not any(_same(case.line, text) for text in shown):
        return f"the decisive line is not shown first: {case.line[:100]}"
    return ""


def _same(line: str, text: str) -> bool:
    """Return whether a text has the beginning of the line, perhaps with other numbers (of processes)."""
    one, other = (re.sub(r"\d+", "#", " ".join(each.split())) for each in (line, text))
    return one[:120] in other


def faults() -> dict[str, dict[str, str]]:
    """Return what is wrong with the diagnosis of each case ("": nothing), by kind and name."""
    index = index_of(load())
    return {
        kind: {case.name: wrong(case, diagnosed((log.encode() for log in case.nodes), index)) for case in those}
        for kind, those in cases().items()
    }


def counted(found: Mapping[str, Mapping[str, str]] | None = None) -> tuple[int, int]:
    """Return how many cases are judged right, and how many there are."""
    every = [fault for those in (found or faults()).values() for fault in those.values()]
    return every.count(""), len(every)


def main() -> int:
    """Print the score of each kind, and each case that is judged wrong."""
    found = faults()
    for kind, those in found.items():
        print("{:20} {:3} of {:3}".format(kind, *counted({kind: those})))
        for name, fault in those.items():
            if fault:
                print(f"    {name}: {fault}")
    right, total = counted(found)
    print(f"{'all':20} {right:3} of {total:3}")
    return int(right < total)


if __name__ == "__main__":
    sys.exit(main())
