"""Make a recipe of what another project's file says: the same rules for all formats."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from msgspec import Struct, field

from sparkinstall import schema
from sparkinstall.recipes import Change, Option, ReadRecipe, Recipe, RecipeError, Source
from sparkinstall.recipes.owned import env_without_owned, without_owned
from sparkinstall.recipes.serve_options import key, last_of_each

_PATCHED_IMAGE = re.compile(r"b12x|mxfp4", re.IGNORECASE)
_PINNED = re.compile(r"[^\s@-][^\s@]*@sha256:[0-9a-f]{64}")
_FILE_OPTIONS = ("--chat-template", "--reasoning-parser-plugin", "--tool-parser-plugin", "--reasoning-plugin")
NEVER_RUN = "no program of a file is ever run"
_NO_CONTAINER = "vLLM runs without a container, with the caches and limits of this node"
_LICENCE = re.compile(rb"SPDX-License-Identifier:\s*([\w.+-]+)")
_LONGEST = 300
_SUFFIXES = {"k": 1000, "K": 1 << 10, "m": 10**6, "M": 1 << 20, "g": 10**9, "G": 1 << 30}


class Place(Struct, frozen=True):
    """A file that is read: its name, its content, and the folder that the user named, if it was one."""

    name: str
    content: bytes
    folder: str = ""

    def error(self, what: str, hint: str = "") -> RecipeError:
        return RecipeError(f"{self.name}: {what}", hint=hint)


class Draft(Struct, kw_only=True):
    """What a file says about one recipe. `solo`: the file allows one node only."""

    format: str
    id: str
    model: str
    args: Sequence[Option]
    env: Mapping[str, str] = field(default_factory=dict)
    revision: str = ""
    bytes: int | None = None
    nodes: int | None = None
    solo: bool = False
    needs_vllm: str = ""
    image: str = ""
    patched: list[str] = field(default_factory=list)
    container: list[str] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def assembled(draft: Draft, place: Place) -> ReadRecipe:
    """Return the recipe, with everything that is not in it as the file says.

    Raises:
        RecipeError: the model is missing, or a value cannot be one of a recipe.
    """
    changes = [*draft.changes]
    args, dropped = without_owned(draft.args)
    changes += _overridden(args)
    fields, rest = _lifted(last_of_each(args))
    env, unset = env_without_owned(draft.env)
    changes += [*dropped, *unset]
    _settle_nodes(draft, fields, changes)
    if draft.image and _PATCHED_IMAGE.search(draft.image):
        draft.patched.append(f"the image {draft.image}")
    if draft.container:
        changes.append(Change(", ".join(draft.container), "ignored", _NO_CONTAINER))
    given = {
        "id": slug(draft.id),
        "model": draft.model,
        "revision": draft.revision or None,
        "bytes": draft.bytes,
        **fields,
        "args": rest,
        "env": env,
        "needs_vllm": draft.needs_vllm or None,
        "needs_build": line("; ".join(draft.patched)) or None,
        "expects": tuple(_expected(rest)),
        "image": draft.image if _PINNED.fullmatch(draft.image) else None,
        "notes": (*map(line, draft.notes), *_remarks(rest)),
        "sources": (Source(f"a file in the format of {draft.format}", path=place.name, licence=_licence(place)),),
    }
    known = {name: value for name, value in _plain(given).items() if value is not None}
    try:
        recipe = schema.read(Recipe, known, place.name)
    except schema.Malformed as error:
        raise RecipeError(error.message, hint=error.hint) from error
    return ReadRecipe(recipe, draft.format, tuple(changes))


def _plain(given: Mapping[str, Any]) -> dict[str, Any]:
    sources = [{"repository": each.repository, "path": each.path, "licence": each.licence} for each in given["sources"]]
    return {**given, "sources": sources}


def _licence(place: Place) -> str | None:
    found = _LICENCE.search(place.content[:1000])
    return found[1].decode("ascii") if found else None


def _overridden(args: Iterable[Option]) -> list[Change]:
    """Name the options that a later one replaces, if it says something else."""
    every = list(args)
    last = {key(each): each for each in every}
    return [
        Change(" ".join(each), "overridden", f"a later option wins: {' '.join(last[key(each)])}")
        for each in every
        if last[key(each)] != each
    ]


def _lifted(args: Iterable[Option]) -> tuple[dict[str, Any], tuple[Option, ...]]:
    """Divide options into the fields of a recipe and the rest. A value that no field can hold stays an option."""
    fields: dict[str, Any] = {}
    rest: list[Option] = []
    for option in args:
        name, read = _FIELDS.get(option[0], ("", None))
        value = read(option[1]) if read and len(option) == 2 else None
        if value is None:
            rest.append(option)
        else:
            fields[name] = value
    # A tool parser implies it.
    if "tool_parser" in fields:
        rest = [each for each in rest if each != ("--enable-auto-tool-choice",)]
    return fields, tuple(rest)


def number(text: str) -> int | None:
    """Return a number from 1, which may have a suffix such as k or G; None if it is none."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)([kKmMgG]?)", text)
    value = int(float(found[1]) * _SUFFIXES.get(found[2], 1)) if found else 0
    return value or None


def _length(text: str) -> int | str | None:
    return "auto" if text.lower() in ("auto", "-1") else number(text)


def _share(text: str) -> float | None:
    value = float(text) if re.fullmatch(r"\d?\.?\d{1,6}", text) else 0
    return value if 0 < value <= 1 else None


def _word(text: str) -> str | None:
    return text if text and text.isprintable() else None


_FIELDS: dict[str, tuple[str, Any]] = {
    "--revision": ("revision", _word),
    "--tensor-parallel-size": ("tensor_parallel", number),
    "--pipeline-parallel-size": ("pipeline_parallel", number),
    "--gpu-memory-utilization": ("memory", _share),
    "--max-model-len": ("context", _length),
    "--max-num-seqs": ("sequences", number),
    "--max-num-batched-tokens": ("batched_tokens", number),
    "--tool-call-parser": ("tool_parser", _word),
    "--reasoning-parser": ("reasoning_parser", _word),
}


def _settle_nodes(draft: Draft, fields: dict[str, Any], changes: list[Change]) -> None:
    """One GPU a node: as many nodes as ranks. A file for one node only has one rank, whatever its defaults say."""
    if draft.solo:
        for name in ("tensor_parallel", "pipeline_parallel"):
            if fields.pop(name, 1) != 1:
                changes.append(Change(name, "overridden", "1: the file is for one node only, which has one GPU"))
    ranks = fields.get("tensor_parallel", 1) * fields.get("pipeline_parallel", 1)
    fields["nodes"] = max(ranks, 1)
    if draft.nodes and draft.nodes != ranks:
        draft.notes.append(f"the file names {draft.nodes} nodes, but its options make {ranks}: one node has one GPU")


def _expected(args: Iterable[Option]) -> Iterable[str]:
    """Yield the files that options name: an image has them, this node does not."""
    for option in args:
        for value in option[1:]:
            is_file = value.endswith((".jinja", ".py")) or value.startswith(("/tmp/", "./", "../"))
            if is_file or (option[0] in _FILE_OPTIONS and "/" in value):
                yield line(value)


def _remarks(args: Iterable[Option]) -> list[str]:
    found = []
    names = {key(each) for each in args}
    config = next((each[1] for each in args if key(each) == "--speculative-config" and each[1:]), "")
    dotted = [name for name in names if name.startswith("--speculative-config.")]
    tokens = "num_speculative_tokens"
    if (config and tokens not in config) or (not config and dotted and f"--speculative-config.{tokens}" not in dotted):
        found.append(f"`{tokens}` is not given: some models need it")
    if "--trust-remote-code" in names:
        found.append("`--trust-remote-code` runs code from the model's repository")
    unfilled = [value for each in args for value in each[1:] if re.fullmatch(r"\{\w+\}", value)]
    return found + [f"the file gives no value for {line(each)}" for each in unfilled]


def slug(text: str) -> str:
    """Return an id: lower-case letters and digits, joined by `-`, `.` or `_`."""
    joined = re.sub(r"[^a-z0-9._]+|[._-]{2,}", "-", text.lower()[:80])
    return re.sub(r"[._-]{2,}", "-", joined).strip("-._") or "recipe"


def line(text: object) -> str:
    """Return a text as one line of limited length."""
    printable = "".join(each if each.isprintable() else " " for each in str(text)[: 2 * _LONGEST])
    return " ".join(printable.split())[:_LONGEST]


def mapping(value: Any, name: str, place: Place) -> Mapping[str, Any]:
    """Return a mapping with text keys; {} if it is absent or empty.

    Raises:
        RecipeError: it is something else.
    """
    if value in (None, "", "null", "~"):
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(each, str) for each in value):
        raise place.error(f"`{name}` must be a mapping, not {schema.show(value)}")
    return value


def texts(value: Any, name: str, place: Place) -> dict[str, str]:
    """Return a mapping of texts, such as variables.

    Raises:
        RecipeError: it is something else.
    """
    found = mapping(value, name, place)
    for each, inner in found.items():
        if not isinstance(inner, str):
            raise place.error(f"`{name}.{line(each)}` must be text, not {schema.show(inner)}")
    return dict(found)


def words(value: Any, name: str, place: Place) -> list[str]:
    """Return a list of texts; [] if it is absent.

    Raises:
        RecipeError: it is something else.
    """
    if value in (None, "", "null", "~"):
        return []
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise place.error(f"`{name}` must be a list of text, not {schema.show(value)}")
    return value


def release(value: Any) -> str:
    """Return a release of vLLM; "" if the value is something else, such as a word for a day's build."""
    return value if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)+", value) else ""


def is_true(value: Any) -> bool:
    """Whether a text means true in YAML."""
    return isinstance(value, str) and value.lower() in ("true", "yes", "on")
