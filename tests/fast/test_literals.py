"""The literals that follow from a regex: every match contains one of them."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkinstall.diagnose.literals import required_literals
from sparkinstall.diagnose.signatures import load

KNOWN = {each.name: each for each in load()}


@pytest.mark.parametrize(
    ("pattern", "literals"),
    [
        ("No space left", ("No space left",)),
        (r"libcuda\.so", ("libcuda.so",)),
        ("disk full|quota exceeded", ("disk full", "quota exceeded")),
        (r"\d+ bytes lost", ("bytes lost",)),
        ("Kill(?:ed)? process", ("Kill process", "Killed process")),
        (r"unique IPs?\b", ("unique IP",)),
        ("[Vv]ersion mismatch", ("Version mismatch", "version mismatch")),
        (r"^(?!.*retrying).*Too many (?:open )?files", ("Too many files", "Too many open files")),
        (r"\bENOSPC\b", ("ENOSPC",)),
        ("(?:spark)+ is out", ("is out",)),
        ("(?:a very long word)+ ab", ("a very long word",)),
        (r"x.*a much longer one", ("a much longer one",)),
        (r"(?i:error) \d+ at /dev/shm", ("at /dev/shm",)),
        ("(?i)permission denied", ()),
        ("a|.*", ()),
        ("(?:abcd)?", ()),
        ("", ()),
    ],
)
def test_literals_of_a_regex_are_required_parts(pattern: str, literals: tuple[str, ...]) -> None:
    assert required_literals(pattern) == literals


_PIECES = st.sampled_from(
    ["ab", "c", "[de]", "f?", "(?:gh|ij)", "(?:k|lm)*", ".", r"\d", "(?:no){1,2}", "(?=p)p", "q+?", "(?i:r)", r"(?!s)t"]
)


@settings(deadline=None)
@given(st.data(), st.lists(_PIECES, min_size=1, max_size=6).map("".join))
def test_literals_of_any_regex_are_in_every_match(data: st.DataObject, pattern: str) -> None:
    literals = required_literals(pattern)
    match = re.search(pattern, data.draw(st.from_regex(pattern)))
    assert match and (not literals or any(each in match[0] for each in literals))


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_signature_examples_contain_an_anchor(name: str) -> None:
    known = KNOWN[name]
    is_found = [any(anchor in line for anchor in known.anchors) for line in known.example]
    assert not any(is_found) if known.general else all(is_found)
