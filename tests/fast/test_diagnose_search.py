"""The search in a log: lines are counted within limits, and any bytes are read, cut anywhere."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from sparkinstall.diagnose import search as log_search
from sparkinstall.diagnose.index import index_of
from sparkinstall.diagnose.judge import judge
from sparkinstall.diagnose.lines import Line
from sparkinstall.diagnose.search import Search
from sparkinstall.diagnose.signatures import Signature
from tests.support.diagnosing import BY_NAME, KNOWN, LINES, LOOKED_FOR, diagnosed, example, read


def test_lines_of_a_failure_are_counted_and_the_first_kept() -> None:
    found = diagnosed(b"ok\n" + example("disk-full") * 5 + b"ok\n").causes[0]
    assert found.count == 5
    assert [place.line for place in found.lines] == [2, 3, 4]


def test_count_of_lines_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_search, "MOST", 4)
    monkeypatch.setattr(log_search, "MOST_WEIGHED", 4)
    search = read(example("disk-full") * 50 + example("oom-killer"), (300,))
    assert search.found.sightings["disk-full"].count == 4
    assert list(search.found.sightings) == ["disk-full", "oom-killer"]
    assert search.lines == 51


def test_noise_of_one_shape_leaves_enough_for_what_comes_after_it() -> None:
    line = b"E1004 09:00:00.100000 812 own.cc:12] own transfer %d failed: own reason\n"
    noise = b"".join(line % number for number in range(50_000))
    found = diagnosed(noise + b"OwnError: the own store is empty\n")
    assert sorted(each.line for each in found.telling) == [1, 50_001]
    assert {each.count for each in found.telling} == {1, log_search.ALIKE}


def test_literals_are_gone_through_only_when_some_have_reached_their_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """To do it for each block takes longer than to search the block."""
    built: list[Search] = []
    build = Search._build

    def counted(self: Search) -> None:
        built.append(self)
        build(self)

    monkeypatch.setattr(Search, "_build", counted)
    monkeypatch.setattr(log_search, "MOST", 4)
    monkeypatch.setattr(log_search, "MOST_WEIGHED", 4)
    monkeypatch.setattr(log_search, "_MOST_FRUITLESS", 20)
    search = Search(LOOKED_FOR, "x")
    for at in range(200):
        search.feed(example("disk-full") + example("cuda-out-of-memory") + NO_FAILURE % (at % 60, at))
    limits = len(search.found.sightings) + len(search._in_vain) + 1
    assert 1 <= len(built) <= limits < 200


NO_FAILURE = b"INFO 10-02 09:00:%02d [core.py:1] option %d is not supported here, error: none\n"


@pytest.mark.parametrize("barren", [100, 3000])
@pytest.mark.parametrize("more", [b"", b", skipped"])
def test_failure_after_many_similar_lines_without_it_is_found(barren: int, more: bytes) -> None:
    log = b"".join(NO_FAILURE % (at % 60, at) for at in range(barren))
    failure = b"RuntimeError: this kernel is not supported on this device" + more + b"\n"
    (cause,) = diagnosed(log + failure).causes
    assert (cause.name, cause.lines[0].line) == ("no-code-for-this-gpu", barren + 1)


def test_failure_is_looked_for_in_a_limited_number_of_lines_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its literal stands in every line: the regex would take most of the time of a large log."""
    monkeypatch.setattr(log_search, "_MOST_FRUITLESS", 100)
    search = Search(LOOKED_FOR, "x")
    for at in range(20):
        search.feed(NO_FAILURE % (at, at))
    search.feed(b"RuntimeError: this kernel is not supported on this device\n" + example("disk-full"))
    search.end()
    assert list(search.found.sightings) == ["disk-full"]


def test_failure_with_several_literals_in_a_line_is_tried_once_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def found_in(known: Signature, line: Line, frames: str) -> None:
        del known, frames
        tried.append(line.text)

    monkeypatch.setattr(Signature, "found_in", found_in)
    two = replace(BY_NAME["disk-full"], anchors=("own rows", "own table"))
    read(b"the own rows of own table, own rows\nown table\n", index=index_of([two]))
    assert tried == ["the own rows of own table, own rows", "own table"]


_PARTS = st.sampled_from(
    [
        *(some[0].encode() for some in LINES.values()),
        *(anchor.encode() for each in KNOWN for anchor in each.anchors),
        *(b"\n", b"\r", b"\r\n", b"\x1b[31m", b"\x00", b"\xff", b" ", b"Error: x", b"ERROR ", b"FATAL", b"a" * 50),
    ]
)
_STREAMS = st.lists(st.one_of(_PARTS, st.binary(max_size=20)), max_size=25).map(b"".join)


def seen(search: Search) -> object:
    return (
        {name: (each.lines, each.count, each.last) for name, each in search.found.sightings.items()},
        [(each.place, each.weight, each.count) for each in search.found.telling],
        search.lines,
        search.bytes,
    )


@given(_STREAMS, st.lists(st.integers(1, 200), min_size=1, max_size=5))
@settings(deadline=None, max_examples=200)
def test_log_read_in_any_pieces_gives_the_same_result(data: bytes, sizes: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_search, "REACH", 60)
        patch.setattr(log_search, "LONG", 200)
        assert seen(read(data, sizes)) == seen(read(data))


@given(st.binary(max_size=400))
@settings(deadline=None)
def test_log_of_arbitrary_bytes_is_read(data: bytes) -> None:
    search = read(data)
    judge([search])
    assert search.lines == data.count(b"\n") + bool(data and not data.endswith(b"\n"))


def test_line_of_300_megabytes_uses_limited_memory() -> None:
    search = Search(LOOKED_FOR, "x")
    for _ in range(300):
        search.feed(b"0123456789abcdef" * 65536)
        assert len(search._waiting) <= log_search.LONG
    search.feed(b" " + example("oom-killer"))
    search.end()
    assert (search.lines, search.bytes >> 20) == (1, 300)
    assert list(search.found.sightings) == ["oom-killer"]


def test_a_literal_with_a_quotation_mark_is_found_in_json() -> None:
    known = replace(BY_NAME["disk-full"], regex=re.compile('no own "part" left'), anchors=('own "part"',))
    search = Search(index_of([known]), "x")
    search.feed(json.dumps({"log": 'no own "part" left\n', "stream": "stderr"}).encode() + b"\n")
    search.end()
    assert list(search.found.sightings) == ["disk-full"]
