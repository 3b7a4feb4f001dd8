"""Files made from templates/."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from sparkinstall.assets import asset
from sparkinstall.resources import State, Unknown
from sparkinstall.resources.files import File
from sparkinstall.system import Reader, System

if TYPE_CHECKING:
    import jinja2

_ESCAPED = {char: "\\" + char for char in '\\"$`'}


def quoted(value: str) -> str:
    """`value` in double quotes, read alike by a POSIX shell and by systemd's EnvironmentFile=.

    Raises:
        ValueError: a control character, which the two do not read alike.
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
    """`template` filled with `values`; a value that is missing is an error."""
    return _templates().get_template(template).render(**values).encode()


@dataclass(frozen=True)
class Rendered:
    """`path` is `template` filled with what `values` finds on the node; None: it cannot be told yet."""

    path: str
    template: str
    values: Callable[[Reader], Mapping[str, Any] | None]
    waits_for: str
    mode: int = 0o644

    @property
    def key(self) -> str:
        return f"file:{self.path}"

    def _file(self, on: Reader) -> File | None:
        values = self.values(on)
        if values is None:
            return None
        return File(self.path, render(self.template, {**values, "path": on.real(self.path)}), self.mode)

    def check(self, on: Reader) -> State:
        file = self._file(on)
        return file.check(on) if file else Unknown(self.waits_for)

    def apply(self, on: System) -> None:
        file = self._file(on)
        assert file is not None, "the engine applies only what can be told"
        file.apply(on)
