"""Files rendered from templates/."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from sparkinstall.assets import asset
from sparkinstall.resources import State, Unknown
from sparkinstall.resources.files import File
from sparkinstall.system import Reader, System

if TYPE_CHECKING:
    import jinja2

_ESCAPED = {char: "\\" + char for char in '\\"$`'}


def quoted(value: str) -> str:
    """Quote `value` so that a POSIX shell and systemd's EnvironmentFile= read the same.

    Raises:
        ValueError: it contains a control character, which they read differently.
    """
    if not str(value).isprintable():
        raise ValueError(f"{value!r} cannot stand in an environment file")
    return '"' + "".join(_ESCAPED.get(char, char) for char in str(value)) + '"'


@lru_cache(maxsize=1)
def _templates() -> "jinja2.Environment":
    import jinja2

    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(asset("templates")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters["quoted"] = quoted
    return found


def render(template: str, values: Mapping[str, Any]) -> bytes:
    """Render `template` with `values`; a missing value is an error."""
    return _templates().get_template(template).render(**values).encode()


class Template(Struct, frozen=True):
    """`path` is `template` rendered with what `values` returns for the node; Unknown if it returns that."""

    path: str
    template: str
    values: Callable[[Reader], Mapping[str, Any] | Unknown]
    mode: int = 0o644

    @property
    def key(self) -> str:
        return f"file:{self.path}"

    def check(self, on: Reader) -> State:
        values = self._values(on)
        return values if isinstance(values, Unknown) else self._file(values).check(on)

    def _values(self, on: Reader) -> Mapping[str, Any] | Unknown:
        values = self.values(on)
        return values if isinstance(values, Unknown) else {**values, "path": on.real(self.path)}

    def _file(self, values: Mapping[str, Any]) -> File:
        return File(self.path, render(self.template, values), self.mode)

    def apply(self, on: System) -> None:
        values = self._values(on)
        assert not isinstance(values, Unknown), "the engine applies no Unknown"
        self._file(values).apply(on)
