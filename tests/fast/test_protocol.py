"""The messages between nodes: one end decodes what the other encodes; unknown fields are ignored, values refused."""

import json
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from sparkinstall.cluster import protocol
from sparkinstall.cluster.protocol import Fetched, Listening, Look
from sparkinstall.core.checks import ProbeResult
from sparkinstall.core.engine import StepReport
from sparkinstall.envelope import VERSION, as_problem, plain
from sparkinstall.errors import Blocked, Problem
from sparkinstall.fixes import MTU
from sparkinstall.probes import Probe, warned
from sparkinstall.resources import Conflict, Drift, NodeOnly, Ok, State, Unknown

STATES = (Ok("9 GB"), Drift("change it", "a", "b"), Unknown("nccl"), NodeOnly("no GPU"), Conflict("taken", "name it"))


def envelope(data: Any, **other: Any) -> bytes:
    return json.dumps({"version": VERSION, "exit_code": 0, "data": data, "errors": [], **other}).encode()


@pytest.mark.parametrize("state", STATES, ids=lambda state: type(state).__name__)
def test_state_after_transfer_is_the_same(state: State) -> None:
    report = StepReport.of("network", [replace(state, key="eth0", changed=True)])
    assert msgspec.json.decode(msgspec.json.encode(report), type=StepReport, dec_hook=as_problem) == report


def test_resource_encoded_is_one_flat_object() -> None:
    (resource,) = msgspec.to_builtins(StepReport.of("network", [Ok("9000", key="eth0")]))["resources"]
    assert resource == {"key": "eth0", "changed": False, "state": "ok", "note": "9000"}


def test_problem_after_transfer_keeps_its_code_and_names_the_node_of_its_log() -> None:
    problem = Blocked("it is taken", cause="someone", hint="move it", log="/var/log/x", output=["a", "b"])
    errors = msgspec.to_builtins([problem], enc_hook=plain)
    (sent,) = protocol.decode(envelope({}, errors=errors, exit_code=1), Look, "spark-2").problems
    assert (sent.code, sent.message, sent.cause, sent.hint) == ("blocked", "it is taken", "someone", "move it")
    assert (sent.log, list(sent.output)) == ("spark-2:/var/log/x", ["a", "b"])


def test_probe_after_transfer_keeps_finding_and_fix() -> None:
    probe = Probe("link", "the link", lambda _: warned("slow", "look"), "link", fix=MTU)
    result = ProbeResult.of(probe, warned("slow", "look"), 0.5)
    assert msgspec.json.decode(msgspec.json.encode(result), type=ProbeResult) == result
    assert (result.name, result.level, result.verdict, result.fix) == ("link", "link", "warn", 2)


def test_reply_with_unknown_fields_ignores_them() -> None:
    step = {"step": "x", "new": 1, "resources": [{"key": "k", "state": "ok", "newer": [2]}]}
    reply = protocol.decode(envelope({"steps": [step], "more": {}}, newest=True), Look)
    assert reply.data is not None
    assert [report.name for report in reply.data.steps] == ["x"]


def test_reply_of_another_version_is_refused() -> None:
    with pytest.raises(Problem, match="replies in version 2 of the protocol") as refused:
        protocol.decode(b'{"version": 2, "everything": "else"}', Look)
    assert "same version" in refused.value.hint


@pytest.mark.parametrize(
    "data",
    [
        {"steps": [{"step": "x", "resources": [{"key": "k", "state": "upside-down"}]}]},
        {"preflight": [{"name": "disk", "verdict": "perhaps", "found": ""}]},
        {"steps": 3},
        [],
    ],
)
def test_reply_with_another_message_is_refused(data: Any) -> None:
    with pytest.raises(Problem, match="does not follow the protocol"):
        protocol.decode(envelope(data), Look)


@pytest.mark.parametrize("reply", [b"", b"Killed", b"[]", b'{"version": 1}', b'{"version": 1, "data": {}}'])
def test_reply_without_envelope_fails(reply: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        protocol.decode(reply, Look)


def test_reply_of_a_failed_verb_has_no_data() -> None:
    reply = protocol.decode(envelope({}, exit_code=1), Fetched)
    assert (reply.code, reply.data) == (1, None)


@pytest.mark.parametrize("line", ["", "00:00:00 working", "{", '{"answers-at": "all"}', '{"port": 1}', "\udc80"])
def test_line_without_announcement_is_none(line: str) -> None:
    assert protocol.announced('{"answers-at": [1, 2]}', Listening) == Listening((1, 2))
    assert protocol.announced(line, Listening) is None
