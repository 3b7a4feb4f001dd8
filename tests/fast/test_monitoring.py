"""`sparkinstall monitoring render`: files for Prometheus that have the names, limits and advice of `watch`."""

import re
from typing import Any

import msgspec
import pytest

from sparkinstall.facts import vllm
from sparkinstall.facts.health import STATES, metrics
from sparkinstall.measure.advice import rules
from sparkinstall.measure.monitoring import rule_file, scrape_config
from sparkinstall.measure.rounds import Slo
from tests.support.rehearsals import envelope, in_this_process

SLO = Slo(500, 250)
METRICS = {
    *(
        name
        for group in (vllm.GAUGES, vllm.COUNTERS, vllm.OF_SPECULATION)
        for each in group.values()
        for name in each.names
    ),
    *(f"{name}_bucket" for each in vllm.HISTOGRAMS.values() for name in each.names),
    *vllm.MOVES_WITH_THE_ENGINE,
}


def groups(slo: Slo = SLO) -> list[list[dict[str, Any]]]:
    """The recording rules, the alerts of `watch`, and those of the timer of `health`."""
    return [each["rules"] for each in msgspec.yaml.decode(rule_file(slo))["groups"]]


def test_scrape_config_has_an_api_on_heads_and_an_exporter_on_all() -> None:
    jobs = msgspec.yaml.decode(scrape_config(["spark-1", "192.168.1.2"], ["spark-2"], 8001))["scrape_configs"]
    assert {each["job_name"]: each["static_configs"][0]["targets"] for each in jobs} == {
        "vllm": ["spark-1:8001", "192.168.1.2:8001"],
        "node": ["spark-1:9100", "192.168.1.2:9100", "spark-2:9100"],
    }


def test_scrape_config_sends_the_key_to_the_api_alone() -> None:
    vllm, exporter = msgspec.yaml.decode(scrape_config(["a"], [], 8000, "/etc/prometheus/key"))["scrape_configs"]
    assert vllm["authorization"] == {"credentials_file": "/etc/prometheus/key"}
    assert "authorization" not in exporter


def test_rules_use_only_metrics_that_vllm_has_and_series_that_are_recorded() -> None:
    records, alerts, of_health = groups()
    text = " ".join(each["expr"] for each in (*records, *alerts, *of_health))
    used = set(re.findall(r"vllm:\w+", text))
    assert used and used <= METRICS
    assert set(re.findall(r"instance:\w+:\w+", text)) <= {each["record"] for each in records}


def test_records_are_four_percentiles_of_three_latencies() -> None:
    names = [each["record"] for each in groups()[0]]
    assert len(set(names)) == len(names) == 3 * 4 + 1
    itl = next(each["expr"] for each in groups()[0] if each["record"] == "instance:vllm_itl_seconds:p99")
    assert itl.startswith("histogram_quantile(0.99, sum by (instance, le) (rate(")
    # An older release has only the second name.
    assert "vllm:inter_token_latency_seconds_bucket|vllm:time_per_output_token_seconds_bucket" in itl


def test_alerts_have_the_limits_and_the_advice_of_watch() -> None:
    alerts = {each["alert"]: each for each in groups()[1]}
    assert set(alerts) == {rule.name for rule in rules() if rule.alert}
    for rule in rules():
        if rule.alert:
            assert alerts[rule.name]["annotations"] == {"summary": rule.means, "description": rule.do}
            # Prometheus has too few samples in the ten seconds of the other one.
            assert rule.limit is None or str(rule.limit) in alerts[rule.name]["expr"] or rule.name == "waiting-grows"
    assert alerts["ttft-high"]["expr"] == "instance:vllm_ttft_seconds:p95 > 0.5"
    assert alerts["no-answer"]["expr"] == 'up{job="vllm"} == 0'
    assert alerts["no-token"]["for"] == "60s"


def test_alerts_of_health_use_what_the_timer_writes() -> None:
    written = {
        line.split()[2] for line in metrics([("any", "pass")], None, 0).splitlines() if line.startswith("# TYPE")
    }
    alerts = {each["alert"]: each["expr"] for each in groups()[2]}
    used = set(re.findall(r"sparkinstall_\w+", " ".join(alerts.values())))
    assert used == written and set(alerts) == {"health-failure", "health-warning", "health-old"}
    assert f"== {STATES['fail']}" in alerts["health-failure"] and f"== {STATES['warn']}" in alerts["health-warning"]


def test_alert_without_a_limit_is_left_out() -> None:
    names = {each["alert"] for each in groups(Slo(itl=100))[1]}
    assert "itl-high" in names and "ttft-high" not in names and "tail-long" in names


@pytest.mark.parametrize("what", ["scrape", "rules"])
def test_render_prints_the_file(what: str) -> None:
    shown = in_this_process("monitoring", "render", what)
    assert shown.returncode == 0
    assert envelope(in_this_process("monitoring", "render", what, "--json"))["data"]["text"] == shown.stdout
    assert msgspec.yaml.decode(shown.stdout)
