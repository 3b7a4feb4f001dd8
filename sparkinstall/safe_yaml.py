"""YAML from people: libyaml's speed, without the crash that deep nesting gives it."""

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
    return yaml.load(content, Loader=yaml.CBaseLoader if only_text else yaml.CSafeLoader)


def _depth(content: bytes) -> int:
    import yaml

    depth = deepest = 0
    for event in yaml.parse(content, Loader=yaml.CSafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        deepest = max(deepest, depth)
        if deepest > _DEEPEST:
            break
    return deepest
