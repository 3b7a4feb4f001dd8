"""Probe vLLM as a client: a completion, a stream, moving counters. /health alone proves nothing."""

import time
from collections.abc import Iterable

from msgspec.structs import replace

from sparkinstall import fixes
from sparkinstall.facts import vllm
from sparkinstall.facts.units import show
from sparkinstall.facts.vllm import GENERATED_TOKENS, KV_CACHE_USAGE
from sparkinstall.layout import VLLM_UNIT as UNIT
from sparkinstall.node import Node
from sparkinstall.probes import Finding, Probe, failed, passed, skipped, streams, vllm_client, warned
from sparkinstall.probes.vllm_client import Api, Reply
from sparkinstall.system import Reader

_REHEARSAL = "a rehearsal starts no services"
_NO_COMPLETION = skipped("no completion came: see `serving`")
# Seconds within which even a large model is loaded.
_LOADING = 1800
# Seconds after which the counters must include our requests.
_COUNTED = 1.0


def probes(node: Node) -> Iterable[Probe]:
    """Yield the probes of the API, which share their requests; none on a worker."""
    shared: dict[int, Api] = {}

    def asked(on: Reader) -> Api:
        return shared.setdefault(id(on), Api(node, on))

    # Workers only compute.
    if node.role != "worker":
        yield Probe(
            "serving", "a completion within a time limit", lambda on: _serving(asked(on)), "serving",
            "Requests get no answer, although the service may run and report healthy.", needs_node=_REHEARSAL,
        )  # fmt: skip
        yield Probe(
            "serving-stream", "reasoning field in a live stream", lambda on: _stream(asked(on)), "serving",
            "A client may show no reasoning, or show it as raw text.", fixes.REASONING, needs_node=_REHEARSAL,
        )  # fmt: skip
        yield Probe(
            "serving-metrics", "the counters of /metrics move", lambda on: _metrics(asked(on)), "serving",
            "Load and latency of the model cannot be monitored.", needs_node=_REHEARSAL,
        )  # fmt: skip


def _serving(of: Api) -> Finding:
    answer, wanted = of.completion, f"within {vllm_client.PATIENCE} s"
    if answer.error:
        if answer.late:
            return _late(of, "no completion")
        if answer.refused:
            return not_up(of.node, of.on)
        if answer.stranger:
            return failed(answer.error, vllm_client.whose(of.node.config.serving.port), f"vLLM of {of.node.user}")
        if answer.status == 401:
            return _locked(of)
        return failed(answer.error, f"read `journalctl -u {UNIT}`", f"a completion within {vllm_client.PATIENCE} s")
    if (model := str(of.node.config.serving.model)) not in (answer.model, *answer.roots) and answer.roots:
        other = f"otherwise another program has port {of.node.config.serving.port}: `serving.port`"
        hint = f"`sparkinstall run serving`, if `serving.model` was changed; {other}"
        return failed(f"it serves {answer.roots[0]}", hint, model)
    return passed(f"{answer.tokens} tokens of {answer.model} in {answer.seconds:.1f} s", wanted)


def _locked(of: Api) -> Finding:
    """Judge a rejected request. The key is from a variable or from its file, never prompted for."""
    key, source = vllm_client.key_of(of.node, of.on)
    if key and source == of.node.api_key:
        return failed(f"the API rejects the key in {source}", f"it was changed: `sudo systemctl restart {UNIT}`")
    if key:
        return failed(f"the API rejects the key in {source}", f"set it to the key that {UNIT} was started with")
    return failed(
        "it asks for a key (HTTP 401)",
        f"put the key into {vllm_client.KEY}, without showing it: "
        f"`read -rs {vllm_client.KEY}; export {vllm_client.KEY}`; then verify again",
    )


def _late(of: Api, what: str) -> Finding:
    besides = ", although /health returns 200" if of.healthy else ""
    hint = f"restart it: `sudo systemctl restart {UNIT}`"
    if of.node.several:
        nodes = "--only peers --only ray-nodes" if of.node.config.cluster.executor == "ray" else "--only peers"
        hint = f"check that every node is up (`sparkinstall verify {nodes}`), then {hint}"
    return failed(
        f"{what} within {vllm_client.PATIENCE} s{besides}",
        hint,
        f"{vllm_client.TOKENS} tokens within {vllm_client.PATIENCE} s",
    )


def _stream(of: Api) -> Finding:
    if of.completion.error:
        return _NO_COMPLETION
    answer = of.stream
    if not answer.done:
        # The stream did not come to its end.
        if answer.late:
            return _late(of, "no end of a stream")
        if "chat template" in answer.error:
            return skipped("this model has no chat template: nobody can chat with it")
        why, hint = answer.error or "the stream was interrupted", f"read `journalctl -u {UNIT}`"
        return failed(why, hint, "a stream to its end")
    if not answer.said:
        return warned("an empty stream", f"send a request by hand, and read `journalctl -u {UNIT}`")
    model, parser = of.completion.model, streams.parser_of(of.node.config.serving.arguments)
    add, fields = streams.adding(of.node, of.on, model), vllm.reasoning_fields(of.node, of.on)
    finding = streams.judged(streams.Transcript(answer.said, answer.prompt, answer.finish), parser, fields, add)
    return replace(finding, found=f"{finding.found}; first token after {answer.first:.1f} s")


def _metrics(of: Api) -> Finding:
    if of.completion.error:
        return _NO_COMPLETION
    before, ours = vllm_client.sample(of.completion.metrics, GENERATED_TOKENS), of.made
    after = of.metrics()
    if before is None or vllm_client.sample(after.metrics, GENERATED_TOKENS) is None:
        return _no_metrics(of, after)
    grown = _grown(after, before)
    if grown < ours:
        time.sleep(_COUNTED)
        after = of.metrics()
        grown = _grown(after, before)
    counted = f"{GENERATED_TOKENS} grew by {grown:.0f} tokens, of which the probes made {ours}"
    if grown < ours:
        return failed(counted, f"another vLLM may answer here: `sudo systemctl restart {UNIT}`", f"{ours} or more")
    cache = vllm_client.sample(after.metrics, *KV_CACHE_USAGE)
    if cache is None:
        return warned(f"{counted}, but there is no {KV_CACHE_USAGE[0]}", _REPORT)
    return passed(f"{counted}; {cache:.0%} of the KV cache is in use", f"{ours} or more")


_REPORT = "report it: this vLLM is newer than sparkinstall knows"


def _grown(after: Reply, before: float) -> float:
    return (vllm_client.sample(after.metrics, GENERATED_TOKENS) or 0) - before


def _no_metrics(of: Api, after: Reply) -> Finding:
    if "--disable-log-stats" in of.node.config.serving.arguments:
        return warned(f"no {GENERATED_TOKENS}", "take `--disable-log-stats` out of `serving.arguments`")
    if why := after.metrics_status or after.error:
        return warned(f"/metrics does not answer: {why}", f"read `journalctl -u {UNIT}`")
    return warned(f"/metrics has no {GENERATED_TOKENS}", _REPORT)


def not_up(node: Node, on: Reader) -> Finding:
    """Return the finding if nothing listens: vLLM is still loading, or has ended."""
    state = show(on, UNIT, "ActiveState", "NRestarts", "ExecMainStartTimestampMonotonic")
    since = time.clock_gettime(time.CLOCK_MONOTONIC) - int(state["ExecMainStartTimestampMonotonic"] or 0) / 1e6
    where = f"nothing answers at 127.0.0.1:{node.config.serving.port}"
    # A unit that systemd keeps restarting looks as if it were loading, each time for a while.
    if again := int(state["NRestarts"] or 0):
        said = f"{where}; systemd has started it {again + 1} times"
        return failed(said, f"`sparkinstall diagnose --unit {UNIT.removesuffix('.service')}`")
    if state["ActiveState"] == "active" and since < _LOADING:
        return warned(
            f"{where}: it was started {since:.0f} s ago and is still loading",
            f"follow it with `journalctl -fu {UNIT}`, then run `sparkinstall verify --only serving`",
        )
    return failed(
        f"{where}; {UNIT} is {state['ActiveState'] or 'unknown'}",
        f"read `journalctl -u {UNIT}`, fix the cause, then `sparkinstall run serving`",
    )
