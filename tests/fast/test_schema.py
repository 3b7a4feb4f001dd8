"""Data from outside is read into its type, or refused in one line that names the place."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pytest
from msgspec import Meta, Struct

from sparkinstall.probes.known_hosts import Rule
from sparkinstall.schema import Malformed, like, read, read_yaml, show


class Port(Struct, frozen=True, forbid_unknown_fields=True):
    number: Annotated[int, Meta(ge=1, le=65535, title="a port from 1 to 65535")]
    protocol: Literal["tcp", "udp"] = "tcp"


class Service(Struct, frozen=True, forbid_unknown_fields=True):
    name: Annotated[str, like("[a-z]+", "a word in lower case")]
    ports: tuple[Port, ...] = ()
    matches: re.Pattern[str] | None = None
    note: str | None = None
    limits: Mapping[str, Any] = {}


GOOD = """\
name: api
ports:
  - number: 8000
  - number: 53
    protocol: udp
matches: ^api
"""


def test_read_yaml_of_valid_text_gives_the_type() -> None:
    found = read_yaml(Service, GOOD.encode(), "x.yaml")
    assert found == Service("api", (Port(8000), Port(53, "udp")), re.compile("^api"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "x.yaml: it must be a mapping with the keys name, ports, matches, note or limits, not null"),
        ("- 1", "x.yaml: it must be a mapping with the keys name, ports, matches, note or limits, not [1]"),
        ("note: x", "x.yaml: `name` is missing: it must be a word in lower case"),
        (GOOD + "prots: []", "x.yaml, line 7: unknown key `prots`: use name, ports, matches, note or limits"),
        (GOOD + "7: []", "x.yaml, line 7: unknown key `7`: use name, ports, matches, note or limits"),
        (GOOD.replace("api\n", "Api\n", 1), "x.yaml, line 1: `name` must be a word in lower case, not 'Api'"),
        (GOOD.replace("53", "0"), "x.yaml, line 4: `ports[1].number` must be a port from 1 to 65535, not 0"),
        (GOOD.replace("udp", "upd"), "`ports[1].protocol` must be one of tcp, udp, not 'upd' (did you mean `udp`?)"),
        (GOOD.replace("number: 53", "numbre: 53"), "`ports[1].numbre`: use number or protocol (did you mean `numb"),
        (GOOD.replace("^api", "(api"), "line 6: `matches` is not a regular expression: missing )"),
        (GOOD + "note: [1]", "line 7: `note` must be text or null, not [1]"),
        (GOOD + "ports: []", "x.yaml: not YAML: the key `ports` is repeated, line 7"),
        ("a: [1", "x.yaml: not YAML: did not find expected ',' or ']', line 2"),
        ("a:\n\tb: 1", "not YAML: there is a tab in line 2 (YAML does not allow tabs for indentation: use spaces)"),
        ("[" * 100_000, "x.yaml: not YAML: larger or deeper than any file of ours"),
        ("#" * 2_000_000, "x.yaml: not YAML: larger or deeper than any file of ours"),
        ("&a [*a]", "x.yaml: it must be a mapping with the keys name, ports, matches, note or limits, not [[["),
    ],
    ids=range(17),
)
def test_read_yaml_of_invalid_text_names_the_place(text: str, says: str) -> None:
    with pytest.raises(Malformed) as caught:
        read_yaml(Service, text.encode(), "x.yaml")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_read_regular_expression_of_alternatives_matches_each() -> None:
    found = read(Service, {"name": "api", "matches": ["(?i)^api", r"\d: port"]}, "x").matches
    assert found
    assert found.pattern == r"(?i)^api|\d: port"
    assert all(found.search(line) for line in ("API is up", "8: Port"))


@pytest.mark.parametrize("wrong", [[], ["api", 1], {"api": 1}, 7])
def test_read_regular_expression_of_other_types_is_refused(wrong: object) -> None:
    with pytest.raises(Malformed, match="x: `matches` must be text or a list of text, not "):
        read(Service, {"name": "api", "matches": wrong}, "x")


def test_read_with_a_key_that_looks_like_a_path_names_the_key() -> None:
    with pytest.raises(Malformed, match="unknown key `x"):
        read(Service, {"name": "api", "x` - at `$.name": 1}, "x")


def test_read_yaml_only_text_keeps_scalars_as_written() -> None:
    assert read_yaml(dict[str, str], b"python: 3.10", "x", only_text=True) == {"python": "3.10"}


def test_show_of_a_value_is_short_and_hides_secrets() -> None:
    assert show("hf_" + "a" * 30) == "'[hidden]'"
    assert len(show("a" * 10_000)) <= 82 and len(show(10**5000)) < 80
    for value in ('{"password": "x"}', {"apiKey": "x"}, [{"hf_token": "x"}], '"{\\"hf-token\\": 1}"', ["--api_key=x"]):
        assert show(value) == "[hidden]", value
    assert show({"tokens": 5}) == "{'tokens': 5}"


def test_host_rule_with_an_unknown_detector_is_refused() -> None:
    row = dict.fromkeys(("name", "title", "impact", "expected", "why", "hint", "concerns"), "x")
    rule = {**row, "looks": "nothing", "limits": {}, "verdict": "warn", "checked": "2026-11-21", "evidence": []}
    with pytest.raises(Malformed, match="looks names no detector: use stranded_memory, "):
        read(Rule, rule, "hosts.yaml")
