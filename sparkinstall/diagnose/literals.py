"""Derive literals from a regular expression such that every match contains one of them."""

import re
from collections.abc import Iterable
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

Literals = frozenset[str]

_MOST = 16
"""Limit on the number of alternatives to enumerate."""
_REPEATS = (op.MAX_REPEAT, op.MIN_REPEAT, op.POSSESSIVE_REPEAT)
_EMPTY: Literals = frozenset({""})


def required_literals(pattern: str) -> tuple[str, ...]:
    """Return the longest literals of which each match of `pattern` contains one; none if none can be derived."""
    tree = _parser.parse(pattern)
    exact, required = _sequence(tree, tree.state.flags)
    # A blank in the pattern may be a tab in the log: the search replaces tabs before it tries the regex.
    best = frozenset(each.strip() for each in _better(exact, required) or ())
    # A literal that contains another one is redundant.
    shortest = sorted(each for each in best if not any(other in each for other in best - {each}))
    return () if "" in best else tuple(shortest)


def _sequence(items: Iterable[Any], flags: int) -> tuple[Literals | None, Literals | None]:
    """Return all texts that a sequence matches (None: too many), and the best literals that they contain."""
    run, best, is_exact = _EMPTY, None, True
    for kind, value in items:
        exact, required = _node(kind, value, flags)
        if exact is not None and len(run) * len(exact) <= _MOST:
            run = frozenset(before + after for before in run for after in exact)
        else:
            best = _better(_better(best, run), required)
            run, is_exact = exact or _EMPTY, False
    return (run, best) if is_exact else (None, _better(best, run))


def _node(kind: Any, value: Any, flags: int) -> tuple[Literals | None, Literals | None]:
    if kind is op.LITERAL:
        char = chr(value)
        varies = flags & re.IGNORECASE and char.lower() != char.upper()
        return (None if varies else frozenset({char})), None
    if kind is op.IN and all(each is op.LITERAL for each, _ in value) and not flags & re.IGNORECASE:
        return frozenset(chr(each) for _, each in value), None
    if kind in (op.AT, op.ASSERT, op.ASSERT_NOT):
        return _EMPTY, None
    if kind is op.SUBPATTERN:
        _, added, removed, items = value
        return _sequence(items, (flags | added) & ~removed)
    if kind is op.ATOMIC_GROUP:
        return _sequence(value, flags)
    if kind is op.BRANCH:
        return _branches([_sequence(each, flags) for each in value[1]])
    if kind in _REPEATS:
        least, most, items = value
        return _repeated(least, most, *_sequence(items, flags))
    return None, None


def _branches(found: list[tuple[Literals | None, Literals | None]]) -> tuple[Literals | None, Literals | None]:
    exact = [each for each, _ in found if each is not None]
    best = [_better(*each) for each in found]
    whole = frozenset().union(*exact) if len(exact) == len(found) else None
    required = frozenset().union(*(each for each in best if each)) if all(best) else None
    return whole, required


def _repeated(
    least: int, most: int, exact: Literals | None, required: Literals | None
) -> tuple[Literals | None, Literals | None]:
    if (least, most) == (1, 1):
        return exact, required
    if least:
        return None, _better(exact, required)
    return (exact | _EMPTY if exact is not None and most == 1 else None), None


def _better(one: Literals | None, other: Literals | None) -> Literals | None:
    """Return the set whose shortest literal is longer; a set with the empty text is useless."""
    sets = [each for each in (one, other) if each and "" not in each]
    return max(sets, key=lambda each: (min(map(len, each)), -len(each)), default=None)
