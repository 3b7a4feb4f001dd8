"""Short logs are read with a wider net than long ones."""

import pytest

from sparkinstall.diagnose import pastes
from sparkinstall.diagnose.index import SignatureIndex, index_of
from sparkinstall.diagnose.judge import Diagnosis, judge
from sparkinstall.diagnose.search import Search
from sparkinstall.diagnose.signatures import load

QUIET = "own-agent: heartbeat number {}\n"


@pytest.fixture(scope="module")
def index() -> SignatureIndex:
    return index_of(load())


def diagnosed(text: str, index: SignatureIndex) -> Diagnosis:
    search = Search(index, "pasted")
    search.feed(text.encode())
    search.end()
    return judge([search])


@pytest.mark.parametrize(
    "line",
    [
        "own-agent: Failed to join the group",
        "own-agent: lease denied by own-b",
        "own-agent: the own token is missing",
        "own-agent: status=3, lease lost",
        "<- own-b rc=255 (0.1s)",
        "OWN_STEP_FAILED reason=lease_held",
        "own-agent: version 3 does not match version 4",
        "own-loader: own16 is only supported by own-b; you may use own32 instead",
    ],
)
def test_short_log_with_words_of_failure_shows_their_line(line: str, index: SignatureIndex) -> None:
    found = diagnosed(f"own-agent: starting\n{line}\n", index)
    assert found.shows_failure
    assert [each.line for each in found.telling] == [2]


@pytest.mark.parametrize(
    "after", ["own-agent: joined, all is ready", "own-agent: retrying in 5 s", "own-agent: goes on, ignoring the lease"]
)
def test_failure_after_which_all_went_well_is_not_shown(after: str, index: SignatureIndex) -> None:
    found = diagnosed(f"own-agent: lease refused by own-b\n{after}\n", index)
    assert not found.shows_failure
    assert not found.telling


@pytest.mark.parametrize(
    "line",
    [
        "own: 4 passed, 0 failed, 0 errors",
        "rx_errors: 0",
        "own_timeout=30",
        "if the lease is refused, own-agent asks again",
        "failed=0 unreachable=0",
        '{"level":"info","error":null}',
        "raise ValueError('the lease is invalid')",
        "| N/A | Not Supported |",
    ],
)
def test_words_of_failure_that_tell_of_none_are_not_shown(line: str, index: SignatureIndex) -> None:
    assert not diagnosed(f"own-agent: starting\n{line}\n", index).telling


def test_long_log_is_read_so_at_its_end_only(index: SignatureIndex) -> None:
    line, quiet = "own-agent: lease denied by own-b\n", "".join(map(QUIET.format, range(pastes.LINES)))
    found = diagnosed(quiet + line, index)
    assert [each.line for each in found.telling] == [pastes.LINES + 1]
    assert found.shows_failure
    assert not diagnosed(line + quiet, index).telling
    assert not diagnosed(f"{quiet}{line}own-agent: retrying\n", index).telling


def test_end_of_a_log_beyond_what_is_kept_has_the_right_number(index: SignatureIndex) -> None:
    count = pastes.BYTES // 10
    log = "".join(map(QUIET.format, range(count))) + "own-agent: lease denied by own-b\n"
    assert [each.line for each in diagnosed(log, index).telling] == [count + 1]


def test_reason_is_shown_before_the_line_that_only_tells_of_an_end(index: SignatureIndex) -> None:
    log = "own-agent exited, aborting\nown-agent: cannot lease own-b: held by own-c\n"
    assert [each.line for each in diagnosed(log, index).telling] == [2, 1]


def test_answer_does_not_depend_on_the_blocks(index: SignatureIndex) -> None:
    log = b"own-agent: starting\nown-agent: lease denied by own-b\n"
    search = Search(index, "pasted")
    for at in range(len(log)):
        search.feed(log[at : at + 1])
    search.end()
    assert [each.place.line for each in search.found.telling] == [2]
