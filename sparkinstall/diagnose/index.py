"""What is looked for in a log: the literals of the known failures, and the words of suspicious lines."""

from collections.abc import Iterable, Mapping, Sequence

from ahocorasick_rs import BytesAhoCorasick, Implementation
from msgspec import Struct

from sparkinstall.diagnose import suspicion, tracebacks
from sparkinstall.diagnose.signatures import Signature


class SignatureIndex(Struct, frozen=True):
    """What is looked for in a log. Logs that are searched for the same signatures share one, which has 40 MB.

    `meanings` has, for each literal, the failures that it may tell of (None: a suspicious line).
    """

    signatures: Sequence[Signature]
    meanings: Mapping[bytes, Sequence[Signature | None]]
    automaton: BytesAhoCorasick
    general: Sequence[Signature]
    families: frozenset[str]
    longest: int


def index_of(signatures: Sequence[Signature]) -> SignatureIndex:
    """Return what these signatures look for."""
    meanings: dict[bytes, list[Signature | None]] = {}
    for each in signatures:
        # JSON, such as that of docker's own files, writes a backslash before a quotation mark.
        written = (text for anchor in each.anchors for text in (anchor, anchor.replace('"', '\\"')))
        for literal in dict.fromkeys(written):
            meanings.setdefault(literal.encode(), []).append(each)
    for word in (*suspicion.WORDS, *tracebacks.BEGINNINGS):
        meanings.setdefault(word.encode(), []).append(None)
    general = [each for each in signatures if each.general]
    families = frozenset(each.family for each in signatures)
    return SignatureIndex(signatures, meanings, automaton(meanings), general, families, max(map(len, meanings)))


def automaton(literals: Iterable[bytes]) -> BytesAhoCorasick:
    """Return what finds all these literals at once."""
    return BytesAhoCorasick(list(literals), implementation=Implementation.DFA)
