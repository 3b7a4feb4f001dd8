"""Recipes from files of the user's.

A file is data: nothing in it is run, no other file is opened because of it, and of a folder only what is in it is read.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from sparkinstall import given, safe_yaml, schema
from sparkinstall.recipes import Change, ReadRecipe, Recipe, RecipeError
from sparkinstall.recipes.catalogue import checked, find, named
from sparkinstall.recipes.readers import nemoclaw, templates, vllm_project
from sparkinstall.recipes.readers.assemble import Place

_ENDINGS = (".yaml", ".yml")
_MOST_FILES = 2000
_MOST_VALUES = 20_000
_DEEPEST = 30


class Found(Struct, frozen=True):
    """The recipes of a file or folder, and the files of a folder that have none, with the reason."""

    recipes: tuple[ReadRecipe, ...]
    skipped: tuple[Change, ...] = ()


def recipes_of(name: str, wanted: str | None = None, *, only_one: bool = False) -> Found:
    """Return the shipped recipe `name`, or the recipes of the file or folder at that path.

    Args:
        wanted: the id of the recipe to return.
        only_one: several recipes are an error.

    Raises:
        RecipeError: there is none, or the file cannot be used.
    """
    if not (name.endswith(_ENDINGS) or os.path.exists(os.path.expanduser(name))):
        return Found((find(name),))
    path = given.absolute(name, "the recipe", RecipeError)
    found = _in_folder(path) if path.is_dir() else Found(_in_file(path))
    if only_one or wanted is not None:
        return Found((named(found.recipes, wanted, name),), found.skipped)
    return found


def _in_folder(folder: Path) -> Found:
    recipes: list[ReadRecipe] = []
    skipped: list[Change] = []
    for path in _files(folder):
        name = str(path.relative_to(folder))
        try:
            _require_inside(path, folder)
            recipes += _in_file(path, folder)
        except RecipeError as error:
            skipped.append(Change(name, "ignored", error.message.removeprefix(f"{path.name}: ")))
    if not recipes:
        why = f"; {skipped[0].what}: {skipped[0].why}" if skipped else ""
        raise RecipeError(f"{folder} has no recipe{why}", hint="name a folder with recipes, or one file")
    return Found(tuple(recipes), tuple(skipped))


def _require_inside(path: Path, folder: Path) -> None:
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError) as error:
        raise RecipeError(f"{path.name}: it is a link that leads in a circle") from error
    if not inside:
        raise RecipeError(f"{path.name}: it is a link to a file outside of the folder")


def _files(folder: Path) -> Iterator[Path]:
    """Yield the YAML files below a folder, in order. Links to folders are not followed."""
    count = 0
    for at, folders, names in os.walk(folder):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        for name in sorted(names):
            if name.endswith(_ENDINGS):
                count += 1
                if count > _MOST_FILES:
                    raise RecipeError(f"{folder} has more than {_MOST_FILES} YAML files", hint="name a smaller folder")
                yield Path(at, name)


def _in_file(path: Path, folder: Path | None = None) -> tuple[ReadRecipe, ...]:
    """Return the recipes of a file; `folder`: what the user named, if it is not the file itself."""
    content = _content(path)
    found = _recipes(_data(content, path.name), Place(path.name, content), folder)
    if not found:
        raise RecipeError(f"{path.name} has no recipe")
    return found


def _data(content: bytes, where: str, *, only_text: bool = False) -> Any:
    try:
        data = safe_yaml.load(content, only_text=only_text)
    except safe_yaml.NotYaml as error:
        raise RecipeError(f"{where}: not YAML: {error}", hint=error.hint) from error
    if _size(data, {}, 0) > _MOST_VALUES:
        raise RecipeError(f"{where}: its aliases stand for more than {_MOST_VALUES} values")
    return data


def _size(data: Any, known: dict[int, int], depth: int) -> int:
    """Count the values of a text as if each alias were written out; `known`: those that were counted."""
    if not isinstance(data, Mapping | list):
        return 1
    if depth > _DEEPEST:
        return _MOST_VALUES + 1
    if id(data) not in known:
        # A part that contains itself counts as too much.
        known[id(data)] = _MOST_VALUES + 1
        parts = data.values() if isinstance(data, Mapping) else data
        known[id(data)] = 1 + sum(_size(each, known, depth + 1) for each in parts)
    return known[id(data)]


def _content(path: Path) -> bytes:
    try:
        content = given.read(path, safe_yaml.LARGEST)
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror or error}", hint="name a readable file") from error
    if len(content) > safe_yaml.LARGEST:
        raise RecipeError(f"{path.name} is larger than {safe_yaml.LARGEST >> 20} MiB, which no recipe is")
    # Files with Windows' line ends are common.
    return content.replace(b"\r\n", b"\n")


def _recipes(data: Any, place: Place, folder: Path | None) -> tuple[ReadRecipe, ...]:
    """Read a file in the format that it has."""
    keys = set(data) if isinstance(data, Mapping) else set()
    if isinstance(data, list) or "id" in keys:
        return _ours(data, place)
    # Other projects' tools take scalars as they are written: 0.80 stays 0.80, and `yes` is a word.
    text = _data(place.content, place.name, only_text=True)
    if str(data.get("apiVersion") if keys else "").startswith("nemoclaw.nvidia.com/"):
        return nemoclaw.read(text, lambda reference: _model_file(folder, reference), place)
    if keys & {"recipe_version", "command", "defaults"}:
        return templates.read(text, data, place)
    if {"meta", "model"} <= keys:
        return vllm_project.read(text, place)
    raise place.error("it has none of the known formats", "docs/recipes.md names them")


def _model_file(folder: Path | None, reference: str) -> Mapping[str, Any] | None:
    """Return the data of a model of NemoClaw that a recipe refers to, if the named folder has it."""
    path = folder / "models" / f"{reference}.yaml" if folder else None
    if folder is None or path is None or not path.is_file():
        return None
    _require_inside(path, folder)
    data = _data(_content(path), path.name, only_text=True)
    return data if isinstance(data, Mapping) else None


def _ours(data: Any, place: Place) -> tuple[ReadRecipe, ...]:
    kind: Any = tuple[Recipe, ...] if isinstance(data, list) else Recipe
    try:
        found = schema.read(kind, data, place.name, content=place.content)
    except schema.Malformed as error:
        raise RecipeError(error.message, hint=error.hint) from error
    return tuple(checked(each, place.name) for each in (found if isinstance(found, tuple) else (found,)))
