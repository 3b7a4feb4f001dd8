"""Find the files of a model that the user names: a folder, a recipe, or a model of the hub."""

import os
from pathlib import Path

from msgspec import Struct

from sparkinstall import given
from sparkinstall.errors import BadUsage
from sparkinstall.models import ModelError
from sparkinstall.models import hub as hubs
from sparkinstall.models.files import Files, LocalFiles
from sparkinstall.recipes import Recipe
from sparkinstall.recipes.catalogue import find, shipped
from sparkinstall.recipes.readers import recipes_of

_RECIPES = (".yaml", ".yml")


class Source(Struct, frozen=True):
    """A model: how it is called, its files, and the recipe that serves it, if one was named."""

    name: str
    files: Files
    recipe: Recipe | None = None


def source_of(name: str, folder: Path | None = None, wanted: str | None = None) -> Source:
    """Find a model.

    Args:
        folder: where the model of a recipe is, if it is not in the cache of the hub.
        wanted: the id of a recipe in a file with several.

    Raises:
        RecipeError, ModelError, BadUsage: there is none, or it cannot be used.
    """
    is_file = name.endswith(_RECIPES)
    if wanted is not None and not is_file:
        raise BadUsage("--id is for a file with several recipes", hint="omit it, or name such a file")
    recipe = _recipe(name, wanted)
    if recipe:
        files = LocalFiles(given.absolute(folder, "--folder", ModelError)) if folder else _files(recipe)
        return Source(recipe.model, files, recipe)
    if folder is not None:
        raise BadUsage("--folder is for a recipe, whose model is there", hint="omit it, or name a recipe")
    if _is_path(name):
        return Source(name, LocalFiles(given.absolute(name, "the model", ModelError)))
    return Source(name, _of_hub(name, ""))


def _recipe(name: str, wanted: str | None) -> Recipe | None:
    if name.endswith(_RECIPES):
        return recipes_of(name, wanted, only_one=True).recipes[0].recipe
    if _is_path(name) or (hubs.is_name(name) and not any(each.id == name for each in shipped())):
        return None
    return find(name).recipe


def _is_path(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~")) or name in (".", "..") or os.path.exists(name)


def _files(recipe: Recipe) -> Files:
    if recipe.model.startswith("/"):
        return LocalFiles(given.absolute(recipe.model, "the recipe's model", ModelError))
    if not hubs.is_name(recipe.model):
        raise ModelError(
            f"the recipe's model {recipe.model} has no files of safetensors by that name",
            hint="name its folder with `--folder`",
        )
    return _of_hub(recipe.model, recipe.revision or "")


def _of_hub(model: str, revision: str) -> Files:
    return hubs.cached(model, revision) or hubs.HubFiles(model, revision)
