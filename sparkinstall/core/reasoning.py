"""Reasoning that a model writes into its answer, between tags: separated while it streams."""

from collections.abc import Iterator
from typing import Literal

from msgspec import Struct

TAGS = (("<think>", "</think>"), ("<seed:think>", "</seed:think>"), ("[THINK]", "[/THINK]"))
"""How models mark it: Qwen, DeepSeek and most others; Seed-OSS; Magistral."""
_OPENING, _CLOSING = (tuple(each) for each in zip(*TAGS, strict=True))

Kind = Literal["reasoning", "content", "unsure"]


class Piece(Struct, frozen=True):
    """A part of an answer. `unsure`: content, unless a closing tag follows, which says that it was reasoning."""

    kind: Kind
    text: str


class Separator:
    """Separates the reasoning at the begin of an answer from its content; a tag may be split over several deltas.

    Only the begin counts: later, a tag is something that the answer is about.

    Args:
        opened: whether the chat template has opened the reasoning already, so that no opening tag comes; None if that
            is unknown.
    """

    def __init__(self, opened: bool | None) -> None:
        self._opened = opened
        self._kind: Kind | None = None
        self._held = ""
        self._at_begin = True
        self.closed = False
        """Whether a closing tag has come: what was unsure is reasoning."""

    def feed(self, text: str) -> Iterator[Piece]:
        """Yield what is certain after this delta; what may be a part of a tag is kept."""
        self._held += text
        if self._kind is None and not self._begin():
            return
        if self._kind in ("reasoning", "unsure"):
            found = [(self._held.index(tag), tag) for tag in _CLOSING if tag in self._held]
            if not found:
                yield from self._pass(len(self._held) - self._part_of_a_tag())
                return
            at, tag = min(found)
            yield from self._pass(at)
            self._kind, self._held, self._at_begin, self.closed = "content", self._held.removeprefix(tag), True, True
        yield from self._pass(len(self._held))

    def end(self) -> Iterator[Piece]:
        """Yield what was kept."""
        self._kind = self._kind or ("reasoning" if self._opened else "content")
        yield from self._pass(len(self._held))

    def _begin(self) -> bool:
        """Determine what the answer begins with; return whether enough of it is there."""
        first = self._held.lstrip()
        if any(tag.startswith(first) for tag in _OPENING):
            return False
        # Some models repeat the tag that the chat template has written.
        tag = next((tag for tag in _OPENING if first.startswith(tag)), "")
        unmarked: Kind = "unsure" if self._opened is None else "content"
        self._kind = "reasoning" if tag or self._opened else unmarked
        self._held = first.removeprefix(tag) if tag else self._held
        return True

    def _part_of_a_tag(self) -> int:
        """Return how many characters at the end may be the begin of a closing tag."""
        sizes = (size for tag in _CLOSING for size in range(1, len(tag)) if self._held.endswith(tag[:size]))
        return max(sizes, default=0)

    def _pass(self, size: int) -> Iterator[Piece]:
        """Yield the first characters of what is held, without the line breaks that follow a tag."""
        text, self._held = self._held[:size], self._held[size:]
        text = text.lstrip("\n") if self._at_begin else text
        if text:
            assert self._kind is not None, "the begin is known"
            self._at_begin = False
            yield Piece(self._kind, text)
