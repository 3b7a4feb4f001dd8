"""Read YAML with libyaml, with limits: deep nesting would crash it."""

from collections.abc import Iterator, Sequence
from typing import Any

import yaml

LARGEST = 1 << 20
_DEEPEST = 20


class NotYaml(ValueError):
    """A text is not YAML. The message gives the reason and the line; `hint`, if any, the remedy."""

    def __init__(self, why: str, hint: str = "") -> None:
        super().__init__(why)
        self.hint = hint


class TooMuch(NotYaml):
    """The text is larger or more deeply nested than any file of sparkinstall."""


def load(content: bytes, *, only_text: bool = False) -> Any:
    """Return the values of a YAML text; with `only_text` every scalar remains the written text (3.10 is not 3.1).

    Raises:
        NotYaml: it is not YAML, or repeats a key.
        TooMuch: more than 1 MiB, or nested more than 20 deep, which can crash libyaml's loader.
    """
    try:
        _require_bounds(content)
        loader = (yaml.CBaseLoader if only_text else yaml.CSafeLoader)(content)
        root = loader.get_single_node()
        _refuse_repeated_keys(root)
        return None if root is None else loader.construct_document(root)
    except NotYaml:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _explained(error, content) from error
    except (LookupError, AttributeError, TypeError) as error:
        # PyYAML does not check the text of a value with a tag, such as `!!bool x`.
        raise NotYaml("a value does not fit its tag") from error


def line_of(content: bytes, path: Sequence[str | int]) -> int:
    """Return the 1-based line of the key or item at `path`, or of its nearest ancestor, in a valid text."""
    node = yaml.compose(content, Loader=yaml.CSafeLoader)
    line = node.start_mark.line + 1 if node else 0
    for step in path:
        parts = _parts(node) if node else {}
        if step not in parts:
            break
        mark, node = parts[step]
        line = mark.line + 1
    return int(line)


def _parts(node: Any) -> dict[Any, tuple[Any, Any]]:
    """Return the parts of a collection by key or index: their position and node."""
    if node.id == "mapping":
        return {key.value: (key.start_mark, value) for key, value in node.value if key.id == "scalar"}
    return {at: (item.start_mark, item) for at, item in enumerate(node.value)} if node.id == "sequence" else {}


def _explained(error: Exception, content: bytes) -> NotYaml:
    mark = getattr(error, "problem_mark", None)
    if mark and _is_at_tab(mark, content):
        return NotYaml(
            f"there is a tab in line {mark.line + 1}", "YAML does not allow tabs for indentation: use spaces"
        )
    lines = str(getattr(error, "problem", None) or error).splitlines()
    place = f", line {mark.line + 1}" if mark else ""
    return NotYaml(f"{ascii(lines[0])[1:-1] if lines else type(error).__name__}{place}")


def _is_at_tab(mark: Any, content: bytes) -> bool:
    """Whether the character that libyaml rejects is a tab in the indentation."""
    lines = content.decode(errors="replace").splitlines()
    if mark.line >= len(lines):
        return False
    line = lines[mark.line]
    indented_with = line[: len(line) - len(line.lstrip())]
    return "\t" in indented_with and mark.column <= len(indented_with)


def _require_bounds(content: bytes) -> None:
    depth = 0
    if len(content) > LARGEST:
        raise TooMuch("larger or deeper than any file of ours")
    for event in yaml.parse(content, Loader=yaml.CSafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise TooMuch("larger or deeper than any file of ours")


def _refuse_repeated_keys(node: Any) -> None:
    """Reject a repeated key: YAML forbids it, but its loaders silently take the last one."""
    for each in _mappings(node, set()):
        seen: set[tuple[str, str]] = set()
        for key, _ in each.value:
            if key.id == "scalar" and (key.tag, key.value) in seen:
                name, line = ascii(key.value)[1:-1], key.start_mark.line + 1
                raise NotYaml(f"the key `{name}` is repeated, line {line}")
            seen.add((key.tag, str(key.value)))


def _mappings(node: Any, known: set[int]) -> Iterator[Any]:
    """Yield every mapping below `node`; one that aliases repeat, once."""
    if node is None or node.id == "scalar" or id(node) in known:
        return
    known.add(id(node))
    pairs = node.id == "mapping"
    if pairs:
        yield node
    for each in node.value:
        for part in each if pairs else (each,):
            yield from _mappings(part, known)
