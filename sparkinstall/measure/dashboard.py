"""A dashboard for Grafana: for each node four cards, and four plots over time, made of vLLM's metrics in Prometheus.

It needs no recorded rules. `$node` and `$model` are its variables; a row is repeated for each chosen node.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from msgspec import Struct

from sparkinstall.facts import vllm
from sparkinstall.measure.advice import rules
from sparkinstall.measure.rounds import Slo

UID = "sparkinstall-vllm"
SCHEMA = 39
"""Of the JSON: Grafana 11 writes it, and later ones convert it."""
PERCENTILES = (50, 90, 95, 99)
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_CHOSEN = 'instance=~"$node", model_name=~"$model"'
_RATE, _SPAN = "$__rate_interval", "5m"
_COLUMNS = 24
_CARD, _PLOT = (6, 4), (12, 8)
_TAIL = "p99 / p50"


class Query(Struct, frozen=True):
    """An expression of PromQL, and the name of what it gives."""

    name: str
    expr: str


class Panel(Struct, frozen=True):
    """A card or a plot. `unit`: Grafana's name of it; `limits`: from where on it is which colour.

    `highest`: the end of its scale; `idle`: what a card says without a number.
    """

    kind: Literal["stat", "timeseries"]
    title: str
    about: str
    unit: str
    queries: Sequence[Query]
    limits: Mapping[str, float] = {}
    highest: float | None = None
    idle: str = "no requests"


def panels(slo: Slo) -> list[Panel]:
    """Return what the row of a node has: the cards, then the plots."""
    seconds = {name: None if limit is None else limit / 1000 for name, limit in (("ttft", slo.ttft), ("itl", slo.itl))}
    share = next(rule.limit for rule in rules() if rule.name == "kv-near-full")
    at = slo.percentile
    cards = [
        Panel("stat", f"{title}, p{at}", about, "s", (Query(f"p{at}", _quantile(key, at)),), _red(seconds.get(key)))
        for key, title, about in _LATENCIES
    ]
    cards.append(
        Panel("stat", "KV cache", _KV, "percentunit", (Query("in use", _cache()),), _red(share), 1.0, "unknown")
    )
    plots = [
        Panel("timeseries", title, about, "s", tuple(_percentiles(key)), _red(seconds.get(key)))
        for key, title, about in _LATENCIES
    ]
    plots.append(
        Panel("timeseries", "KV cache", _KV, "percentunit", tuple(_cache_over_time()), _red(share), 1.0, "unknown")
    )
    return [*cards, *plots]


_LATENCIES = (
    ("ttft", "TTFT", "Time to the first token: what a person waits before an answer begins."),
    ("itl", "ITL", "Time from one token to the next: how fast an answer is read out."),
    ("e2e", "E2E", "A whole request; it depends on how long the answers are."),
)
_KV = "The share of the KV cache that is in use. When it is full, requests wait or are computed again."


def dashboard(slo: Slo) -> str:
    """Return the dashboard as JSON that Grafana imports."""
    found = {
        "uid": UID,
        "title": "vLLM on DGX Spark",
        "description": "Latencies and the KV cache of each node. Made by sparkinstall.",
        "tags": ["vllm", "sparkinstall"],
        "schemaVersion": SCHEMA,
        "editable": True,
        "timezone": "browser",
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": list(_variables())},
        "annotations": {"list": []},
        "panels": list(_placed(panels(slo))),
    }
    return json.dumps(found, indent=2) + "\n"


# --- PromQL


def _rate(key: str) -> str:
    """Return the requests a second by bucket; the names of older releases too, of which a server has one."""
    names = [f"{name}_bucket" for name in vllm.HISTOGRAMS[key].names]
    named = f"{names[0]}{{{_CHOSEN}}}" if len(names) == 1 else f'{{__name__=~"{"|".join(names)}", {_CHOSEN}}}'
    return f"sum by (instance, le) (rate({named}[{_RATE}]))"


def _quantile(key: str, percentile: int) -> str:
    return f"histogram_quantile({percentile / 100:g}, {_rate(key)})"


def _percentiles(key: str) -> Iterator[Query]:
    yield from (Query(f"p{each}", _quantile(key, each)) for each in PERCENTILES)
    yield Query(_TAIL, f"{_quantile(key, 99)} / {_quantile(key, 50)}")


def _cache() -> str:
    return f'max by (instance) ({{__name__=~"{"|".join(vllm.KV_CACHE_USAGE)}", {_CHOSEN}}})'


def _cache_over_time() -> Iterator[Query]:
    yield Query("in use", _cache())
    yield Query(f"average of {_SPAN}", f"avg_over_time({_cache()}[{_SPAN}:])")
    yield Query(f"peak of {_SPAN}", f"max_over_time({_cache()}[{_SPAN}:])")


# --- Grafana's JSON


def _variables() -> Iterator[dict[str, Any]]:
    yield {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    running = vllm.RUNNING_REQUESTS[0]
    for name, label, of, within in (
        ("node", "Node", "instance", ""),
        ("model", "Model", "model_name", '{instance=~"$node"}'),
    ):
        yield {
            "name": name,
            "label": label,
            "type": "query",
            "datasource": _SOURCE,
            "query": {"query": f"label_values({running}{within}, {of})", "refId": name},
            # When the time range changes: a node that came later is there.
            "refresh": 2,
            "sort": 1,
            "multi": True,
            "includeAll": True,
            "current": {"text": ["All"], "value": ["$__all"]},
        }


def _placed(row: Sequence[Panel]) -> Iterator[dict[str, Any]]:
    """Yield the row, and its panels from left to right."""
    place = {"x": 0, "y": 0, "w": _COLUMNS, "h": 1}
    yield {
        "id": 1,
        "type": "row",
        "title": "$node",
        "collapsed": False,
        "repeat": "node",
        "gridPos": place,
        "panels": [],
    }
    x, y = 0, 1
    for number, each in enumerate(row, start=2):
        wide, high = _CARD if each.kind == "stat" else _PLOT
        if x + wide > _COLUMNS:
            x, y = 0, y + high
        yield {"id": number, **_panel(each), "gridPos": {"x": x, "y": y, "w": wide, "h": high}}
        x += wide
        if x == _COLUMNS:
            x, y = 0, y + high


def _panel(of: Panel) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    steps += [{"color": colour, "value": value} for colour, value in of.limits.items()]
    defaults: dict[str, Any] = {"unit": of.unit, "min": 0, "thresholds": {"mode": "absolute", "steps": steps}}
    if of.highest is not None:
        defaults["max"] = of.highest
    card = of.kind == "stat"
    # Without requests a percentile is NaN.
    idle = {"type": "special", "options": {"match": "null+nan", "result": {"text": of.idle, "index": 0}}}
    defaults |= {"mappings": [idle]} if card else {"custom": _LINES if of.limits else _PLAIN}
    return {
        "type": of.kind,
        "title": of.title,
        "description": of.about,
        "datasource": _SOURCE,
        "targets": [_target(number, each) for number, each in enumerate(of.queries)],
        "fieldConfig": {"defaults": defaults, "overrides": [] if card else [_ASIDE]},
        "options": _CARD_OPTIONS if card else _PLOT_OPTIONS,
    }


def _target(number: int, of: Query) -> dict[str, Any]:
    return {"refId": chr(ord("A") + number), "datasource": _SOURCE, "expr": of.expr, "legendFormat": of.name}


def _red(limit: float | None) -> Mapping[str, float]:
    return {} if limit is None else {"red": limit}


_PLAIN = {"drawStyle": "line", "lineWidth": 1, "fillOpacity": 0, "showPoints": "never", "spanNulls": False}
_LINES = {**_PLAIN, "thresholdsStyle": {"mode": "line"}}
# The ratio has no unit: it gets the axis on the right.
_ASIDE = {
    "matcher": {"id": "byName", "options": _TAIL},
    "properties": [
        {"id": "unit", "value": "none"},
        {"id": "custom.axisPlacement", "value": "right"},
        {"id": "custom.axisLabel", "value": _TAIL},
        {"id": "custom.thresholdsStyle", "value": {"mode": "off"}},
        {"id": "custom.lineStyle", "value": {"fill": "dash", "dash": [6, 6]}},
    ],
}
_CARD_OPTIONS = {
    "reduceOptions": {"values": False, "calcs": ["lastNotNull"], "fields": ""},
    "colorMode": "value",
    "graphMode": "area",
    "textMode": "value",
    "orientation": "auto",
    "justifyMode": "auto",
}
_PLOT_OPTIONS = {
    "legend": {"displayMode": "table", "placement": "bottom", "showLegend": True, "calcs": ["lastNotNull", "max"]},
    "tooltip": {"mode": "multi", "sort": "none"},
}
