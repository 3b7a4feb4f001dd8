"""Grafana's own types of a dashboard, which its SDK has, as a schema: JSON that does not have them is named."""

import enum
import inspect
import re
import types
import typing
from collections.abc import Iterator
from functools import cache
from typing import Any

from grafana_foundation_sdk.models import dashboard, prometheus, stat, timeseries

_KEY = re.compile(r'if "(\w+)" in data:(?:(?!in data:).)*?args\["(\w+)"\]', re.DOTALL)
# What the types of a panel leave open, by its `type`: its options, and `custom` of its fields.
_OF_PANEL = {"stat": (stat.Options, None), "timeseries": (timeseries.Options, timeseries.FieldConfig)}


def problems(found: Any) -> list[str]:
    """Return where a dashboard differs from the types, such as `$.panels[1].fieldConfig: unknown field \\`max\\``."""
    return list(_problems(found, dashboard.Dashboard, "$"))


def _problems(found: Any, kind: Any, at: str) -> Iterator[str]:
    origin, within = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        yield from _of_any(found, within, at)
    elif origin is list and isinstance(found, list):
        for number, each in enumerate(found):
            yield from _problems(each, within[0], f"{at}[{number}]")
    elif origin is dict and isinstance(found, dict):
        for name, each in found.items():
            yield from _problems(each, within[1], f"{at}.{name}")
    elif inspect.isclass(kind) and hasattr(kind, "from_json") and isinstance(found, dict):
        yield from _of_class(found, kind, at)
    elif not _is(found, kind):
        yield f"{at}: {found!r} is no {kind}"


def _of_any(found: Any, kinds: tuple[Any, ...], at: str) -> Iterator[str]:
    """Name the problems of the kind that has the fewest; what is there is not compared with None."""
    possible = [each for each in kinds if each is not type(None) or found is None]
    yield from min((list(_problems(found, each, at)) for each in possible), key=len)


def _of_class(found: dict[str, Any], kind: Any, at: str) -> Iterator[str]:
    kinds = _fields(kind)
    for name, each in found.items():
        if name not in kinds:
            yield f"{at}: unknown field `{name}`"
        else:
            yield from _problems(each, kinds[name], f"{at}.{name}")
    if kind is dashboard.Panel:
        yield from _of_panel(found, at)


def _of_panel(found: dict[str, Any], at: str) -> Iterator[str]:
    if found["type"] not in _OF_PANEL:
        yield f"{at}: no types of a panel `{found['type']}` are known"
        return
    options, custom = _OF_PANEL[found["type"]]
    yield from _problems(found.get("options", {}), options, f"{at}.options")
    written = found["fieldConfig"]["defaults"].get("custom", {})
    yield from _problems(written, custom or dict[str, typing.Never], f"{at}.fieldConfig.defaults.custom")
    for number, each in enumerate(found.get("targets", ())):
        yield from _problems(each, prometheus.Dataquery, f"{at}.targets[{number}]")


@cache
def _fields(kind: Any) -> dict[str, Any]:
    """The types of a class's fields by their name in JSON."""
    hints = typing.get_type_hints(kind)
    # A `type` that has one value is not read from JSON.
    constant = {"type": hints["type_val"]} if "type_val" in hints else {}
    return constant | {name: hints[own] for name, own in _KEY.findall(inspect.getsource(kind.from_json))}


def _is(found: Any, kind: Any) -> bool:
    if kind is object or kind is Any:
        return True
    if typing.get_origin(kind) is typing.Literal:
        return found in typing.get_args(kind)
    if not inspect.isclass(kind):
        return False
    if issubclass(kind, enum.Enum):
        return found in [each.value for each in kind]
    if kind is float:
        return isinstance(found, int | float) and not isinstance(found, bool)
    # A query of any data source; that of Prometheus is looked at with its panel.
    return isinstance(found, dict) if kind.__name__ == "Dataquery" else type(found) is kind
