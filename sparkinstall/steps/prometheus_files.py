"""Files for Prometheus: what to scrape, percentiles to record, and alerts that say the same as `watch`."""

import json
from collections.abc import Iterator, Mapping, Sequence

from sparkinstall.facts import vllm
from sparkinstall.facts.health import LAST_RUN as HEALTH_LAST_RUN
from sparkinstall.facts.health import STATE as HEALTH_STATE
from sparkinstall.layout import HEALTH_UNIT
from sparkinstall.probes.reading_rules import rules

NODE_EXPORTER = 9100
_PERCENTILES = (50, 90, 95, 99)
_SEVERITY = {"red": "critical", "yellow": "warning"}


def scrape_config(heads: Sequence[str], workers: Sequence[str], port: int, key_file: str = "") -> str:
    """Return the whole configuration of a Prometheus: vLLM of `heads`, which have an API, node_exporter of all.

    `key_file`: the file with the API's key, as Prometheus sees it; "": the API asks for none.
    """
    lines = ["global:", "  scrape_interval: 5s", "  evaluation_interval: 15s", "rule_files: [sparkinstall.rules.yml]"]
    lines.append("scrape_configs:")
    for job, hosts, at in (("vllm", heads, port), ("node", [*heads, *workers], NODE_EXPORTER)):
        targets = ", ".join(_quoted(f"{host}:{at}") for host in hosts)
        lines += [f"  - job_name: {job}", f"    static_configs: [{{targets: [{targets}]}}]"]
        if job == "vllm" and key_file:
            lines.append(f"    authorization: {{credentials_file: {_quoted(key_file)}}}")
    return _text(lines)


def rule_file(ttft: float | None, itl: float | None) -> str:
    """Return recording rules for percentiles, and an alert for each rule of `watch` for which there are numbers.

    `ttft` and `itl`: milliseconds that the 95th percentile must not exceed; None: not limited.
    """
    lines = ["groups:", "  - name: sparkinstall-records", "    rules:"]
    for name, expr in _records():
        lines += [f"      - record: {name}", f"        expr: {_quoted(expr)}"]
    lines += ["  - name: sparkinstall-alerts", "    rules:", *_alerts({"ttft": ttft, "itl": itl})]
    return _text([*lines, "  - name: sparkinstall-health", "    rules:", *_alerts_of_health()])


def _records() -> Iterator[tuple[str, str]]:
    for key, metric in vllm.HISTOGRAMS.items():
        names = "|".join(f"{name}_bucket" for name in metric.names)
        rate = f'sum by (instance, le) (rate({{__name__=~"{names}"}}[1m]))'
        for percentile in _PERCENTILES:
            yield f"instance:vllm_{key}_seconds:p{percentile}", f"histogram_quantile({percentile / 100:g}, {rate})"
    yield "instance:vllm_waiting:sum", f"sum by (instance) ({vllm.WAITING_REQUESTS[0]})"


def _alerts(limits: Mapping[str, float | None]) -> Iterator[str]:
    for rule in rules():
        if rule.alert is None or (rule.reading in limits and rule.limit is None and limits[rule.reading] is None):
            continue
        seconds = {name: f"{limit / 1000:g}" for name, limit in limits.items() if limit is not None}
        yield f"      - alert: {rule.name}"
        yield f"        expr: {_quoted(rule.alert.expr.format(limit=rule.limit, **seconds))}"
        if rule.alert.lasts:
            yield f"        for: {rule.alert.lasts}s"
        yield f"        labels: {{severity: {_SEVERITY[rule.level]}}}"
        yield f"        annotations: {{summary: {_quoted(rule.means)}, description: {_quoted(rule.do)}}}"


def _alerts_of_health() -> Iterator[str]:
    """The alerts for what the timer of `health` writes: the rules themselves have judged."""
    of_rule, hint = "{{ $labels.rule }}", "`sparkinstall health` on that node says what it means and what to do"
    late = "nobody knows any more whether the node is healthy", f"`journalctl -u {HEALTH_UNIT}` on that node says why"
    for name, expr, lasts, severity, summary, do in (
        ("health-failure", f"{HEALTH_STATE} == 2", 0, "critical", f"the rule {of_rule} of `health` fails", hint),
        ("health-warning", f"{HEALTH_STATE} == 1", 600, "warning", f"the rule {of_rule} of `health` warns", hint),
        ("health-old", f"time() - {HEALTH_LAST_RUN} > 3600", 0, "warning", *late),
    ):
        yield from (f"      - alert: {name}", f"        expr: {_quoted(expr)}", f"        for: {lasts}s")
        yield f"        labels: {{severity: {severity}}}"
        yield f"        annotations: {{summary: {_quoted(summary)}, description: {_quoted(do)}}}"


def _quoted(text: str) -> str:
    """Return a text as a scalar of YAML, which takes those of JSON."""
    return json.dumps(text)


def _text(lines: Sequence[str]) -> str:
    return "\n".join(lines) + "\n"
