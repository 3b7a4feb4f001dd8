"""`monitoring render dashboard`: Grafana's types, PromQL that promtool takes, and the percentiles of `watch`."""

import copy
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from sparkinstall.downloads import NotDownloaded
from sparkinstall.errors import CommandFailed
from sparkinstall.facts import vllm
from sparkinstall.measure import histogram
from sparkinstall.measure.dashboard import dashboard, panels
from sparkinstall.measure.metrics_text import told
from sparkinstall.measure.rounds import Slo
from sparkinstall.measure.vllm_dashboards import VLLM_DASHBOARDS, VllmDashboard, fetched
from tests.support.grafana_schema import problems
from tests.support.local_server import listening
from tests.support.promtool import checked
from tests.support.rehearsals import envelope, in_this_process

CASES = Path(__file__).parents[1] / "cases/watch"
IDLE, LOAD = ((CASES / f"0.18.1-{name}.txt").read_text() for name in ("idle", "load"))
SLO = Slo(500, 250)
NODES = ("spark-1:8000", "spark-2:8000")


@pytest.fixture
def found() -> dict[str, Any]:
    made: dict[str, Any] = json.loads(dashboard(SLO))
    return made


def queries() -> list[tuple[str, str, str]]:
    return [(each.title, query.name, query.expr) for each in panels(SLO) for query in each.queries]


def asked(expr: str, node: str, model: str = "/srv/model") -> str:
    """The expression as Grafana sends it."""
    return expr.replace("$node", node).replace("$model", model).replace("$__rate_interval", "2m")


# --- Grafana


def test_dashboard_has_the_types_of_grafana(found: dict[str, Any]) -> None:
    assert problems(found) == []


def test_schema_names_what_grafana_would_not_take(found: dict[str, Any]) -> None:
    def after(*path: Any, value: Any) -> list[str]:
        changed = at = copy.deepcopy(found)
        for step in path[:-1]:
            at = at[step]
        at[path[-1]] = value
        return problems(changed)

    assert after("tittle", value="x") == ["$: unknown field `tittle`"]
    assert any(
        "$.panels[1].options.graphMode" in each for each in after("panels", 1, "options", "graphMode", value="a")
    )
    assert any("exprr" in each for each in after("panels", 5, "targets", 0, "exprr", value="up"))
    assert any("custom" in each for each in after("panels", 5, "fieldConfig", "defaults", "custom", "wide", value=1))
    assert any("gridPos.w" in each for each in after("panels", 2, "gridPos", "w", value="6"))


def test_row_of_a_node_has_four_cards_and_four_plots_without_overlap(found: dict[str, Any]) -> None:
    row, *others = found["panels"]
    assert (row["type"], row["repeat"]) == ("row", "node")
    assert [(each["type"], each["title"]) for each in others] == [
        *(("stat", title) for title in ("TTFT, p95", "ITL, p95", "E2E, p95", "KV cache")),
        *(("timeseries", title) for title in ("TTFT", "ITL", "E2E", "KV cache")),
    ]
    assert len({each["id"] for each in found["panels"]}) == 9
    squares = [
        (x, y)
        for of in (each["gridPos"] for each in found["panels"])
        for x in range(of["x"], of["x"] + of["w"])
        for y in range(of["y"], of["y"] + of["h"])
    ]
    assert len(set(squares)) == len(squares) and max(x for x, _ in squares) == 23
    for plot in others[4:7]:
        assert [each["legendFormat"] for each in plot["targets"]] == ["p50", "p90", "p95", "p99", "p99 / p50"]


def test_variables_are_the_nodes_and_models_that_vllm_names(found: dict[str, Any]) -> None:
    source, node, model = found["templating"]["list"]
    assert (source["type"], source["query"]) == ("datasource", "prometheus")
    assert node["query"]["query"] == "label_values(vllm:num_requests_running, instance)"
    assert model["query"]["query"] == 'label_values(vllm:num_requests_running{instance=~"$node"}, model_name)'
    assert {each for _, _, expr in queries() for each in re.findall(r"\$(\w+)", expr)} == {
        *("node", "model", "__rate_interval")
    }


def test_limits_of_the_objective_are_red_and_no_limit_is_no_colour() -> None:
    def red(slo: Slo) -> dict[str, float]:
        cards = json.loads(dashboard(slo))["panels"][1:5]
        steps = {each["title"]: each["fieldConfig"]["defaults"]["thresholds"]["steps"] for each in cards}
        return {title: found[1]["value"] for title, found in steps.items() if len(found) > 1}

    assert red(SLO) == {"TTFT, p95": 0.5, "ITL, p95": 0.25, "KV cache": 0.9}
    assert red(Slo(itl=100)) == {"ITL, p95": 0.1, "KV cache": 0.9}


# --- Prometheus


def test_metrics_are_those_that_vllm_has() -> None:
    known = {
        *vllm.KV_CACHE_USAGE,
        *(f"{name}_bucket" for each in vllm.HISTOGRAMS.values() for name in each.names),
    }
    used = {name for _, _, expr in queries() for name in re.findall(r"vllm:\w+", expr)}
    assert used == known


def test_promtool_takes_each_expression(tmp_path: Path) -> None:
    rules = [{"record": f"q{at}", "expr": asked(expr, NODES[0])} for at, (_, _, expr) in enumerate(queries())]
    (tmp_path / "rules.yml").write_bytes(msgspec.yaml.encode({"groups": [{"name": "q", "rules": rules}]}))
    run = checked("check", "rules", "rules.yml", cwd=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{len(rules)} rules found" in run.stdout
    wrong = [{"record": "q", "expr": "sum(rate(x[1m])"}]
    (tmp_path / "wrong.yml").write_bytes(msgspec.yaml.encode({"groups": [{"name": "q", "rules": wrong}]}))
    assert checked("check", "rules", "wrong.yml", cwd=tmp_path).returncode != 0


def series() -> Iterator[dict[str, str]]:
    """What Prometheus has of two nodes after a minute: one under the recorded load, one that is idle."""
    (idle, load) = (
        {(each.name, *sorted(each.labels.items())): each for family in families for each in family.samples}
        for families in map(text_string_to_metric_families, (IDLE, LOAD))
    )
    for key, before in idle.items():
        for node, after in zip(NODES, (load[key].value, before.value), strict=True):
            labels = ",".join(
                f"{name}={json.dumps(value)}" for name, value in (*before.labels.items(), ("instance", node))
            )
            yield {"series": f"{before.name}{{{labels}}}", "values": f"{before.value} {after}"}


def evaluated(tests: Sequence[tuple[str, float | None]], folder: Path) -> str:
    """Let promtool evaluate expressions at the end of the minute; "" if each has its value, else what differs."""
    cases = [
        {"expr": expr, "eval_time": "1m", "exp_samples": [] if value is None else [{"labels": "{}", "value": value}]}
        for expr, value in tests
    ]
    group = {"interval": "1m", "input_series": list(series()), "promql_expr_test": cases}
    (folder / "none.yml").write_text("groups: []\n")
    (folder / "test.yml").write_bytes(msgspec.yaml.encode({"rule_files": ["none.yml"], "tests": [group]}))
    run = checked("test", "rules", "test.yml", cwd=folder)
    return "" if run.returncode == 0 else run.stdout + run.stderr


def test_each_query_gives_a_number_under_load_and_a_latency_none_without(tmp_path: Path) -> None:
    def count(expr: str, node: str) -> str:
        # NaN is not equal to itself.
        return f"count(({asked(expr, node)}) == ({asked(expr, node)}))"

    busy = [(count(expr, NODES[0]), 1.0) for _, _, expr in queries()]
    idle = [(count(expr, NODES[1]), 1.0 if "KV" in title else None) for title, _, expr in queries()]
    assert evaluated([*busy, *idle], tmp_path) == ""
    other = count(queries()[0][2].replace("$model", "/srv/other"), NODES[0])
    assert evaluated([(other, None)], tmp_path) == ""
    assert evaluated([(other, 1.0)], tmp_path) != "", "a value that is not there is told"


def test_percentiles_are_those_of_watch(tmp_path: Path) -> None:
    """From the same two texts; `watch` gives no value in the first bucket."""
    tests: list[tuple[str, float | None]] = []
    before, after = told(IDLE), told(LOAD)
    for key, title in (("ttft", "TTFT"), ("itl", "ITL"), ("e2e", "E2E")):
        grown = histogram.grown(before.histograms[key], after.histograms[key])
        assert grown
        for name, expr in ((name, expr) for at, name, expr in queries() if at == title and name != "p99 / p50"):
            value = histogram.percentile(grown, int(name[1:]) / 100).value
            if value is not None:
                tests.append((f"count(abs({asked(expr, NODES[0])} - {value!r}) < 1e-9)", 1.0))
    assert len(tests) > 5
    assert evaluated(tests, tmp_path) == ""


# --- the verb


def test_render_prints_the_dashboard_with_the_objective() -> None:
    shown = in_this_process("monitoring", "render", "dashboard", "--slo", "ttft=2s")
    assert shown.stdout == dashboard(Slo(2000))
    assert envelope(in_this_process("monitoring", "render", "dashboard", "--json"))["data"] == {"text": dashboard(SLO)}


def test_vllm_is_refused_for_what_it_does_not_have() -> None:
    assert in_this_process("monitoring", "render", "rules", "--vllm", "overview").returncode == 2
    assert in_this_process("monitoring", "render", "dashboard", "--vllm", "none").returncode == 2


def test_fetched_takes_only_the_known_file() -> None:
    class Files(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/a/b.json" else 404)
            self.end_headers()
            self.wfile.write(b'{"title": "a"}')

        def log_message(self, *_: object) -> None:
            pass

    digest = hashlib.sha256(b'{"title": "a"}').hexdigest()
    with listening(Files) as url:
        assert fetched(VllmDashboard("a/b.json", digest, "", at=url)) == '{"title": "a"}'
        with pytest.raises(CommandFailed, match="not the file"):
            fetched(VllmDashboard("a/b.json", "0" * 64, "", at=url))
        with pytest.raises(NotDownloaded):
            fetched(VllmDashboard("a/c.json", digest, "", at=url))
    assert all(re.fullmatch("[0-9a-f]{64}", each.sha256) for each in VLLM_DASHBOARDS.values())
