"""The rules of readings as data (`knowledge/readings.yaml`): what `watch` says, and what Prometheus alerts of."""

from functools import lru_cache
from typing import Any, Literal

from msgspec import Struct, to_builtins
from msgspec.structs import replace

from sparkinstall import schema
from sparkinstall.assets import asset
from sparkinstall.probes import known_hosts

KNOWLEDGE = "knowledge/readings.yaml"
Level = Literal["red", "yellow"]


class Alert(Struct, frozen=True, forbid_unknown_fields=True):
    """A condition in PromQL, a text for `format`; it must hold for `lasts` seconds."""

    expr: str
    lasts: int = 0


class Rule(Struct, frozen=True, forbid_unknown_fields=True):
    """A condition of a reading. `looks` names its detector, `limit` is its argument; a name: that rule's of hosts."""

    name: str
    reading: str
    looks: str
    limit: Any
    level: Level
    when: str
    means: str
    do: str
    alert: Alert | None = None

    @property
    def condition(self) -> str:
        """`when` with the limit in it."""
        return self.when.format(**(self.limit if isinstance(self.limit, dict) else {"limit": self.limit}))


@lru_cache(maxsize=1)
def rules() -> tuple[Rule, ...]:
    """Return the shipped rules, in order."""
    hosts = {each.name: each.limits for each in known_hosts.rules()}
    found = schema.read_file(tuple[Rule, ...], asset(KNOWLEDGE))
    return tuple(
        replace(each, limit=to_builtins(hosts[each.limit])) if isinstance(each.limit, str) else each for each in found
    )
