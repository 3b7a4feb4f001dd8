"""Recipes from files of the user's.

A file is data: nothing in it is run, no other file is opened because of it, and of a folder only what is in it is read.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from sparkinstall import given, safe_yaml, schema
from sparkinstall.recipes import Change, ReadRecipe, Recipe, RecipeError
from sparkinstall.recipes.catalogue import checked, find, named

_ENDINGS = (".yaml", ".yml")
_MOST_FILES = 2000


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
            if not path.resolve().is_relative_to(folder.resolve()):
                raise RecipeError(f"{name} is a link to a file outside of the folder")
            recipes += _in_file(path)
        except RecipeError as error:
            skipped.append(Change(name, "ignored", error.message.removeprefix(f"{path.name}: ")))
    if not recipes:
        why = f"; {skipped[0].what}: {skipped[0].why}" if skipped else ""
        raise RecipeError(f"{folder} has no recipe{why}", hint="name a folder with recipes, or one file")
    return Found(tuple(recipes), tuple(skipped))


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


def _in_file(path: Path) -> tuple[ReadRecipe, ...]:
    content = _content(path)
    try:
        data = safe_yaml.load(content)
    except safe_yaml.NotYaml as error:
        raise RecipeError(f"{path.name}: not YAML: {error}", hint=error.hint) from error
    found = _reader(data, path.name)(data, content, path.name)
    if not found:
        raise RecipeError(f"{path.name} has no recipe")
    return found


def _content(path: Path) -> bytes:
    try:
        content = given.read(path, safe_yaml.LARGEST)
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror or error}", hint="name a readable file") from error
    if len(content) > safe_yaml.LARGEST:
        raise RecipeError(f"{path.name} is larger than {safe_yaml.LARGEST >> 20} MiB, which no recipe is")
    # Files with Windows' line ends are common.
    return content.replace(b"\r\n", b"\n")


Reader = Callable[[Any, bytes, str], tuple[ReadRecipe, ...]]


def _reader(data: Any, where: str) -> Reader:
    """Return the reader of the format that a file has."""
    if isinstance(data, list) or (isinstance(data, Mapping) and "id" in data):
        return _ours
    raise RecipeError(f"{where} has none of the known formats", hint="docs/recipes.md names them")


def _ours(data: Any, content: bytes, where: str) -> tuple[ReadRecipe, ...]:
    kind: Any = tuple[Recipe, ...] if isinstance(data, list) else Recipe
    try:
        found = schema.read(kind, data, where, content=content)
    except schema.Malformed as error:
        raise RecipeError(error.message, hint=error.hint) from error
    return tuple(checked(each, where) for each in (found if isinstance(found, tuple) else (found,)))
