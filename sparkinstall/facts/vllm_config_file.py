"""The file of options that `vllm serve --config` reads, as the words that vLLM makes of it."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from msgspec.structs import replace

from sparkinstall import schema
from sparkinstall.facts.vllm_options import Declared, Refusal

OPTION = "--config"
_ENDINGS = (".yaml", ".yml")


class Unusable(Exception):
    """vLLM cannot use the file: why, and what to do."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


def named_in(arguments: Sequence[str]) -> str:
    """Return the file that vLLM reads, "" if there is none: it takes the option only as a word of its own."""
    at = [place for place, word in enumerate(arguments[:-1]) if word == OPTION]
    return arguments[at[0] + 1] if at else ""


def words_of(path: str, content: bytes) -> tuple[str, ...]:
    """Return the file as words of a command line; vLLM puts them before the others.

    Raises:
        Unusable: vLLM ends when it reads the file.
    """
    if not path.endswith(_ENDINGS):
        raise Unusable(Refusal(f"{path} is no YAML file by its name", "vLLM wants a name that ends in .yaml"))
    try:
        found = schema.read_yaml(dict[str, Any], content, path)
    except schema.Malformed as error:
        raise Unusable(
            Refusal(error.message, error.hint or "write one option a line: `max-model-len: 4096`")
        ) from error
    return tuple(word for name, value in found.items() for word in _words(name, value))


def _words(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, bool):
        # Of one that is false, older releases make nothing, and newer ones `--no-NAME` where there is one.
        yield from (f"--{name}",) if value else ()
    elif isinstance(value, list):
        yield from (f"--{name}", *map(str, value)) if value else ()
    else:
        # As one word: what a file has as a value is one, whatever it begins with.
        yield f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"


def closed(declared: Declared) -> Declared:
    """Return the same for a file that was read: it cannot name a plug-in that is not known."""
    opened = {name: tuple(each for each in by if each != OPTION) for name, by in declared.opened_by.items()}
    return replace(declared, opened_by=opened)
