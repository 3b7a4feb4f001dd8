"""YAML from people: libyaml's speed, without the crash that deep nesting gives it."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from sparkinstall.assets import user_cache

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


def load_table(content: bytes, *, only_text: bool = False) -> Any:
    """The values of a table of ours (a stack, the patches), as `load` gives them, parsed once.

    What a text says is kept as JSON under its sha256, as Python keeps its bytecode: a run with nothing to do
    would otherwise spend a tenth of its time on YAML.

    Raises:
        ValueError: it is no YAML, or larger or deeper than any file of ours.
    """
    digest = hashlib.sha256(content).hexdigest()
    kept = _tables() / f"{digest}{'-text' if only_text else ''}.json"
    try:
        return json.loads(kept.read_bytes())
    except (OSError, ValueError):
        values = _parsed(content, only_text)
        _keep(kept, values)
        return values


def forget_tables() -> None:
    """Remove what `load_table` has kept, and the cache with it where nothing else is in it."""
    import shutil

    shutil.rmtree(_tables(), ignore_errors=True)
    with suppress(OSError):
        user_cache().rmdir()


def _tables() -> Path:
    return user_cache() / "tables"


def _parsed(content: bytes, only_text: bool) -> Any:
    import yaml

    try:
        return load(content, only_text=only_text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from error


def _keep(path: Path, values: Any) -> None:
    # What JSON has no word for (a date) is not kept: it would come back as something else.
    with suppress(OSError, TypeError):
        text = json.dumps(values)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(text)
        part.replace(path)


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
