"""What the vLLM of each shipped stack takes, and what the vLLM takes that a node has or will have.

knowledge/vllm-serve.json has the former: tools/vllm_serve.py makes it from the wheels.
"""

import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from msgspec import Struct

from sparkinstall import schema
from sparkinstall.assets import asset
from sparkinstall.facts import vllm
from sparkinstall.facts.decisions import installed_stack
from sparkinstall.facts.python_source import Read
from sparkinstall.facts.vllm_options import Declared, Fold, Kind, Option, Refusal, refusals
from sparkinstall.node import Node, site_packages
from sparkinstall.stacks import StackError
from sparkinstall.system import Reader
from sparkinstall.wheelhouse import Wheelhouse

FILE = "vllm-serve.json"
_Words = str
"""Words with a space between them: a line of the file for each kind."""


class Group(Struct, frozen=True, forbid_unknown_fields=True):
    """What these releases have, and no other one: options by kind, values and keys by option, and variables."""

    releases: tuple[str, ...]
    options: Mapping[Kind, _Words] = {}
    choices: Mapping[str, _Words] = {}
    folds: Mapping[str, Fold] = {}
    keys: Mapping[str, _Words] = {}
    variables: _Words = ""


class Known(Struct, frozen=True):
    """What the vLLM of a node takes; `source`: where that was read, in words."""

    declared: Declared
    source: str


@lru_cache(maxsize=1)
def shipped() -> tuple[Declared, ...]:
    """Return what the vLLM of each shipped stack takes, oldest first."""
    path = asset("knowledge") / FILE
    groups = schema.read_json(tuple[Group, ...], path.read_bytes(), path.name)
    names = sorted({each for group in groups for each in group.releases}, key=_order)
    return tuple(_release(name, [group for group in groups if name in group.releases]) for name in names)


def _order(release: str) -> tuple[int, ...]:
    return tuple(map(int, release.split(".")))


def _release(name: str, groups: Sequence[Group]) -> Declared:
    choices, keys, folds = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list), dict[str, Fold]()
    for group in groups:
        folds.update(group.folds)
        for option, values in group.choices.items():
            choices[option] += values.split(" ")
        for option, words in group.keys.items():
            keys[option] += words.split(" ")
    kinds = {option: kind for group in groups for kind, words in group.options.items() for option in words.split()}
    options = {
        name: Option(kind, tuple(choices[name]), folds.get(name, ""), tuple(keys[name])) for name, kind in kinds.items()
    }
    return vllm.with_files(name, options, frozenset(word for group in groups for word in group.variables.split()))


def grouped(releases: Iterable[Declared]) -> list[Group]:
    """Return the groups of the file: the reverse of `shipped`."""
    having = defaultdict[tuple[str, ...], list[str]](list)
    for each in releases:
        for option, known in each.options.items():
            having["option", known.kind, option].append(each.release)
            for value in known.choices:
                having["choice", option, value].append(each.release)
            if known.fold:
                having["fold", option, known.fold].append(each.release)
            for key in known.keys:
                having["key", option, key].append(each.release)
        for name in each.variables - vllm.READ_ELSEWHERE.keys():
            having["variable", name].append(each.release)
    facts = defaultdict[tuple[str, ...], list[tuple[str, ...]]](list)
    for fact, names in having.items():
        facts[tuple(names)].append(fact)
    return [_group(names, sorted(facts[names])) for names in sorted(facts, key=lambda names: (-len(names), names))]


def _group(releases: tuple[str, ...], facts: Sequence[tuple[str, ...]]) -> Group:
    lines: dict[str, Any] = {"option": {}, "choice": {}, "fold": {}, "key": {}}
    for kind, *rest in facts:
        if kind != "variable":
            lines[kind].setdefault(rest[0], []).append(rest[1])
    joined = {kind: {key: " ".join(words) for key, words in of.items()} for kind, of in lines.items()}
    variables = " ".join(fact[1] for fact in facts if fact[0] == "variable")
    made = {"options": joined["option"], "choices": joined["choice"], "folds": joined["fold"], "keys": joined["key"]}
    return schema.read(Group, {"releases": releases, **made, "variables": variables}, FILE)


# --- one vLLM


def refused_by(
    read: Read, argv: Sequence[str], variables: Iterable[str], exists: Callable[[str], bool] | None = None
) -> list[Refusal] | None:
    """Return what the vLLM whose files `read` finds does not take; None if they are not understood.

    The other arguments are those of `refusals`.
    """
    found = vllm.declared(read)
    return refusals(argv, variables, found, shipped(), exists) if found else None


def known(node: Node, on: Reader) -> Known | None:
    """Return what the vLLM of the node's stack takes: from the environment, else its wheel, else the shipped table.

    None if its stack is not shipped, and neither installed nor downloaded.
    """
    return _installed(node, on) or _downloaded(node) or _shipped(node)


def _installed(node: Node, on: Reader) -> Known | None:
    site = site_packages(node, on)
    if site is None or installed_stack(on, node.venv_stamp) != node.stack.name:
        return None
    found = vllm.declared(lambda path: on.read(f"{site}/{path}"), vllm.has_plugins(on, site))
    return Known(found, "the installed vLLM") if found else None


def _downloaded(node: Node) -> Known | None:
    try:
        pins = [pin for pin in node.wheels.locked() if pin.name == "vllm"]
        wheels = Wheelhouse(node.cache / "wheels").found(pins)
        with zipfile.ZipFile(wheels[pins[0]]) as wheel:
            names = set(wheel.namelist())
            found = vllm.declared(lambda path: wheel.read(path) if path in names else None)
    except (StackError, LookupError, OSError, zipfile.BadZipFile):
        return None
    return Known(found, "vLLM's wheel") if found else None


def _shipped(node: Node) -> Known | None:
    platform, release = node.stack.platforms.get(node.platform), node.stack.vllm
    if platform and any(pin.name == "vllm" for pin in platform.wheels):
        # A build of its own may take more than the release of that name.
        return None
    found = next((each for each in shipped() if each.release == release), None)
    return Known(found, f"vLLM {release}") if found else None
