"""`sparkinstall monitoring render`: files for Prometheus that have the names, limits and advice of `watch`."""

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sparkinstall.facts import vllm
from sparkinstall.facts.health import STATES, metrics
from sparkinstall.facts.life import LifeState, Wedge
from sparkinstall.measure.advice import rules
from sparkinstall.measure.rounds import Slo
from sparkinstall.steps.prometheus_files import rule_file, scrape_config
from tests.support.promtool import checked
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
    return [each["rules"] for each in msgspec.yaml.decode(rule_file(slo.ttft, slo.itl))["groups"]]


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


# --- what Prometheus itself says of the files

CASES = Path(__file__).parents[1] / "cases/alerts.yaml"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with what `render` prints, and a key."""
    (tmp_path / "key").write_text("0123456789abcdef")
    (tmp_path / "prometheus.yml").write_text(scrape_config(["spark-1"], ["spark-2"], 8000, "key"))
    (tmp_path / "sparkinstall.rules.yml").write_text(rule_file(500, 250))
    return tmp_path


def test_promtool_accepts_the_configuration_with_its_rules(files: Path) -> None:
    run = checked("check", "config", "prometheus.yml", cwd=files)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{sum(map(len, groups()))} rules found" in run.stdout
    (files / "sparkinstall.rules.yml").write_text(
        rule_file(500, 250).replace("histogram_quantile", "histogram_quantil")
    )
    assert checked("check", "config", "prometheus.yml", cwd=files).returncode != 0


def test_alerts_fire_for_their_faults_and_for_nothing_else(files: Path) -> None:
    (files / "alerts.yaml").write_text(CASES.read_text())
    run = checked("test", "rules", "alerts.yaml", cwd=files)
    assert run.returncode == 0, run.stdout + run.stderr
    # A case that fires nothing at another limit shows that the cases are judged.
    (files / "sparkinstall.rules.yml").write_text(rule_file(5000, 250))
    assert checked("test", "rules", "alerts.yaml", cwd=files).returncode != 0


def test_promtool_accepts_the_metrics_of_the_timer(tmp_path: Path) -> None:
    life = LifeState("2026-11-30T00:53:15Z", "alive", "", 3, 2, (Wedge("2026-11-30T00:10:00Z", "nothing"),), ("x",))
    text = metrics([("memory-low", "pass"), ("gpu-xid", "fail")], life, 1_796_000_000)
    run = checked("check", "metrics", cwd=tmp_path, given=text)
    assert (run.returncode, run.stdout + run.stderr) == (0, "")
    assert checked("check", "metrics", cwd=tmp_path, given=text.replace("} 0", "}")).returncode != 0
