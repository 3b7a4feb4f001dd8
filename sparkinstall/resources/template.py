"""Files rendered from templates/."""

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from sparkinstall.assets import asset
from sparkinstall.facts.decisions import as_text, recorded
from sparkinstall.resources import Drift, Ok, State, Unknown
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
        if isinstance(values, Unknown):
            return values
        if self._was_made_from(values, on):
            return Ok()
        state = self._file(values).check(on)
        return Drift(f"record the inputs of {self.path}") if isinstance(state, Ok) else state

    def rendered(self, on: Reader) -> bytes | Unknown:
        """Return what the file would contain."""
        values = self._values(on)
        return values if isinstance(values, Unknown) else self._file(values).content

    def _values(self, on: Reader) -> Mapping[str, Any] | Unknown:
        values = self.values(on)
        return values if isinstance(values, Unknown) else {**values, "path": on.real(self.path)}

    def _file(self, values: Mapping[str, Any]) -> File:
        return File(self.path, render(self.template, values), self.mode)

    def _was_made_from(self, values: Mapping[str, Any], on: Reader) -> bool:
        """Return whether the file is byte for byte what these values and templates rendered before: rendering again
        would take a quarter of a converged run."""
        made, entry = self._notes(on).get(self.path), on.entry(self.path)
        content = on.read(self.path) if entry and entry.kind == "file" and entry.mode == self.mode else None
        return content is not None and made == (inputs_digest(values), hashlib.sha256(content).hexdigest())

    def _notes(self, on: Reader) -> dict[str, tuple[str, str]]:
        return recorded(on, self._record, dict[str, tuple[str, str]]) or {}

    @property
    def _record(self) -> str:
        return f"{self.path.rpartition('/')[0]}/.rendered.json"

    def apply(self, on: System) -> None:
        values = self._values(on)
        assert not isinstance(values, Unknown), "the engine applies no Unknown"
        file = self._file(values)
        file.apply(on)
        made = (inputs_digest(values), hashlib.sha256(file.content).hexdigest())
        notes = {**self._notes(on), self.path: made}
        on.write(self._record, as_text(notes).encode())


def inputs_digest(values: Mapping[str, Any]) -> str:
    """Return the sha256 of everything that a rendering depends on: the values and every template."""
    digest = hashlib.sha256(json.dumps(dict(values), sort_keys=True).encode())
    for template in sorted(asset("templates").iterdir()):
        digest.update(template.name.encode() + b"\0" + template.read_bytes())
    return digest.hexdigest()
