"""Readers of recipes with a command template: sparkrun (v2) and eugr/spark-vllm-docker (v1)."""

import json
import re
from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from sparkinstall.recipes import Change, Option, ReadRecipe
from sparkinstall.recipes.readers.assemble import (
    NEVER_RUN,
    Draft,
    Place,
    assembled,
    is_true,
    line,
    mapping,
    release,
    texts,
)
from sparkinstall.recipes.serve_options import options, serve_call

_SPARKRUN, _EUGR = "sparkrun", "eugr/spark-vllm-docker"
_LARGEST = 1 << 16
_ROUNDS = 10
_PLACE = re.compile(r"\{(\w+)\}")
_DOUBLED = re.compile(r"\{\{|\}\}|\{(\w+)\}")
_RUNTIMES = ("vllm", "vllm-distributed", "vllm-ray", "eugr-vllm")
_BUILDS = ("mods", "build_args", "builder", "builder_config")
_HOOKS = ("pre_exec", "post_exec", "post_commands", "stop_after_post")
_CONTAINER = ("container", "containers", "executor", "executor_config", "runtime_cache", "scheduler", "layout")
_KNOWN = (
    *("recipe_version", "name", "description", "model", "model_revision", "runtime", "runtime_version", "min_nodes"),
    *("max_nodes", "mode", "solo_only", "cluster_only", "defaults", "env", "command", "metadata", "readiness"),
    *("benchmark", "runtime_config", *_BUILDS, *_HOOKS, *_CONTAINER),
)
# Keys of `defaults` whose option has another name.
_RENAMED = {
    "tensor_parallel": "tensor-parallel-size",
    "pipeline_parallel": "pipeline-parallel-size",
    "data_parallel": "data-parallel-size",
    "decode_context_parallel": "decode-context-parallel-size",
}


def read(data: Mapping[str, Any], typed: Mapping[str, Any], place: Place) -> tuple[ReadRecipe, ...]:
    """Read a recipe of sparkrun or of eugr/spark-vllm-docker.

    Args:
        data: the file with every scalar as text.
        typed: the same with YAML's types.

    Raises:
        RecipeError: it is for another engine, or has no model or no command.
    """
    is_first = str(data.get("recipe_version", "")).partition(".")[0] == "1" or "recipe_version" not in data
    runtime = str(data.get("runtime") or "vllm")
    if runtime not in _RUNTIMES:
        raise place.error(f"it is for {line(runtime)}, not for vLLM")
    values = _values(data, typed, place)
    call = _call(data, values, place, is_first)
    metadata = mapping(data.get("metadata"), "metadata", place)
    description = data.get("description") or metadata.get("description") or ""
    draft = Draft(
        format=_EUGR if is_first else _SPARKRUN,
        id=str(data.get("name") or place.name.rpartition(".")[0]),
        model=call.model or values.get("model", ""),
        args=call.args,
        env={**texts(data.get("env"), "env", place), **call.env},
        revision=str(data.get("model_revision") or ""),
        nodes=_least_nodes(data),
        solo=is_true(data.get("solo_only")) or str(data.get("max_nodes")) == "1" or data.get("mode") == "solo",
        needs_vllm=release(data.get("runtime_version")),
        image=str(data.get("container") or ""),
        notes=[str(description)] if description else [],
    )
    _builds(draft, data)
    ranks = [each[1] for each in call.args if each[0] == "--tensor-parallel-size" and each[1:]]
    if is_first and ranks[-1:] not in ([], ["1"]) and not draft.solo and not is_true(data.get("cluster_only")):
        draft.notes.append("its tool serves it on one node too, then with tensor parallel 1")
    if call.other:
        draft.changes.append(Change(line(call.other), "ignored", NEVER_RUN))
    if unknown := [line(each) for each in data if each not in _KNOWN]:
        draft.changes.append(Change(", ".join(unknown), "ignored", "no key that a recipe of this format has"))
    return (assembled(draft, place),)


def _builds(draft: Draft, data: Mapping[str, Any]) -> None:
    """Note what the file does beside serving: patches, hooks, a container."""
    for name in _BUILDS:
        if data.get(name) not in (None, "", [], {}):
            draft.patched.append(f"{name} {_listed(data[name])}")
    for name in _HOOKS:
        if data.get(name) not in (None, "", [], {}):
            draft.patched.append(f"{name} of the file")
            draft.changes.append(Change(f"{name}: {_listed(data[name])}", "ignored", NEVER_RUN))
    draft.container = [f"{name} {_listed(data[name])}" for name in _CONTAINER if data.get(name)]


def _listed(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return line(", ".join(value[:20]))
    return line(value) if isinstance(value, str) else "of the file"


def _least_nodes(data: Mapping[str, Any]) -> int | None:
    least = str(data.get("min_nodes") or "")
    return int(least) if re.fullmatch(r"[1-9]\d{0,3}", least) else None


# --- the template


def _values(data: Mapping[str, Any], typed: Mapping[str, Any], place: Place) -> dict[str, str]:
    """Return the values for the template as text; a mapping is JSON."""
    defaults, types = mapping(data.get("defaults"), "defaults", place), typed.get("defaults") or {}
    found = {name: each if isinstance(each, str) else _json(types.get(name)) for name, each in defaults.items()}
    if isinstance(model := data.get("model"), str) and model:
        found["model"] = model
    return _resolved(found, place)


def _json(value: Any) -> str:
    return json.dumps(value, default=str, skipkeys=True)


class _Call(Struct, frozen=True):
    """A call of `vllm serve`: the variables before it, and what else the command runs."""

    model: str
    args: tuple[Option, ...]
    env: Mapping[str, str] = {}
    other: str = ""


def _call(data: Mapping[str, Any], values: Mapping[str, str], place: Place, is_first: bool) -> _Call:
    """Return what the file's command calls, or a command made of `defaults`."""
    template = data.get("command")
    if template in (None, ""):
        if is_first:
            raise place.error("it has no `command`")
        return _Call("", _options_from(values))
    if not isinstance(template, str):
        raise place.error("`command` must be text")
    # Both dialects occur under both numbers of version: doubled braces tell.
    command = filled(template, values, place, doubled="{{" in template)
    try:
        found = serve_call(command)
    except ValueError as error:
        raise place.error(f"`command` cannot be read: {error}") from error
    first, args = options(found.words)
    return _Call(first[0] if first else "", args, found.env, " ".join(found.other))


def _options_from(values: Mapping[str, str]) -> tuple[Option, ...]:
    """Build options from `defaults`, where the file has no command."""
    found: list[Option] = []
    for name, value in values.items():
        option = f"--{_RENAMED.get(name, name.replace('_', '-'))}"
        if name == "model" or value.lower() in ("false", "no", "off", "null", ""):
            continue
        found.append((option,) if is_true(value) else (option, value))
    return tuple(found)


def _resolved(values: Mapping[str, str], place: Place) -> dict[str, str]:
    """Put values into each other, until nothing changes.

    Raises:
        RecipeError: they refer to each other without an end.
    """
    found = dict(values)
    for _ in range(_ROUNDS):
        again = {name: filled(value, found, place, doubled=False) for name, value in found.items()}
        if again == found:
            return found
        found = again
    raise place.error("the values of `defaults` refer to each other without an end")


def filled(template: str, values: Mapping[str, str], place: Place, *, doubled: bool) -> str:
    """Put values into a template, once. An unknown `{name}` stays, and so does JSON.

    Args:
        doubled: a doubled brace stands for one, as in Python's format.

    Raises:
        RecipeError: the result is too large.
    """

    def value_of(found: re.Match[str]) -> str:
        return found[0][0] if found[1] is None else values.get(found[1], found[0])

    pattern = _DOUBLED if doubled else _PLACE
    # Before it is made: a few lines can stand for more text than fits into memory.
    if sum(len(value_of(each)) for each in pattern.finditer(template)) + len(template) > _LARGEST:
        raise place.error(f"the values of `defaults` make its command longer than {_LARGEST >> 10} KiB")
    return pattern.sub(value_of, template)
