"""YAML from people: libyaml's speed, without the crash that deep nesting gives it."""

from collections.abc import Iterator
from typing import Any

_LARGEST = 1 << 20
_DEEPEST = 20


class TooMuch(ValueError):
    """The text is larger or deeper than any file of ours."""


def load(content: bytes, *, only_text: bool = False) -> Any:
    """The values of a YAML text; with `only_text` every scalar stays the text that was written (3.10 is no 3.1).

    Raises:
        TooMuch: more than 1 MiB, or nested more than 20 deep: libyaml's loader would end the process.
        yaml.YAMLError, ValueError, RecursionError: it is no YAML.
    """
    import yaml

    if len(content) > _LARGEST or _depth(content) > _DEEPEST:
        raise TooMuch("larger or deeper than any file of ours")
    _refuse_repeated_keys(yaml.compose(content, Loader=yaml.CSafeLoader))
    return yaml.load(content, Loader=yaml.CBaseLoader if only_text else yaml.CSafeLoader)


def _refuse_repeated_keys(node: Any) -> None:
    """YAML forbids a key that stands twice, and yet its loaders take the last one without a word."""
    import yaml

    for each in _mappings(node, set()):
        seen: set[tuple[str, str]] = set()
        for key, _ in each.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key `{key.value}` stands twice", key.start_mark
                )
            seen.add((key.tag, str(key.value)))


def _mappings(node: Any, known: set[int]) -> Iterator[Any]:
    """Every mapping below `node`; what an alias names again is looked at once."""
    import yaml

    if not isinstance(node, yaml.CollectionNode) or id(node) in known:
        return
    known.add(id(node))
    pairs = isinstance(node, yaml.MappingNode)
    if pairs:
        yield node
    for each in node.value:
        for part in each if pairs else (each,):
            yield from _mappings(part, known)


def _depth(content: bytes) -> int:
    import yaml

    depth = deepest = 0
    for event in yaml.parse(content, Loader=yaml.CSafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        deepest = max(deepest, depth)
        if deepest > _DEEPEST:
            break
    return deepest
