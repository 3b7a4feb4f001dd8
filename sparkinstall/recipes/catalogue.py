"""The shipped recipes, and those in a file of the user's that has the same format."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from msgspec.structs import replace

from sparkinstall import schema, stacks
from sparkinstall.assets import asset
from sparkinstall.recipes import ReadRecipe, Recipe, RecipeError
from sparkinstall.recipes.owned import env_without_owned, without_owned
from sparkinstall.recipes.serve_options import options

FOLDER = "knowledge/recipes"


@lru_cache(maxsize=1)
def shipped() -> tuple[Recipe, ...]:
    """Return the shipped recipes, by file and in their order."""
    return tuple(each for path in sorted(asset(FOLDER).glob("*.yaml")) for each in _in_file(path))


def _in_file(path: Path) -> tuple[Recipe, ...]:
    return schema.read_file(tuple[Recipe, ...], path)


def find(name: str) -> ReadRecipe:
    """Return the shipped recipe with that id, or of that model if it is the only one.

    Raises:
        RecipeError: there is none, or several.
    """
    if found := [each for each in shipped() if each.id == name]:
        return ReadRecipe(found[0])
    of_model = [each for each in shipped() if each.model.lower() == name.lower()]
    if len(of_model) == 1:
        return ReadRecipe(of_model[0])
    if of_model:
        ids = schema.either([each.id for each in of_model])
        raise RecipeError(f"{name} has several recipes", hint=f"name one: {ids}")
    near = schema.nearest(name.lower(), [*(each.id for each in shipped()), *(each.model for each in shipped())], 0.5)
    hint = "`sparkinstall recipes` lists them; a file of yours is named by its path, such as ./NAME.yaml"
    raise RecipeError(f"there is no recipe {schema.show(name)}", hint=f"{near} {hint}".strip())


def checked(recipe: Recipe, where: str) -> ReadRecipe:
    """Return a recipe in our format without what sparkinstall decides itself.

    Raises:
        RecipeError: it names no shipped stack, or its first word is no option.
    """
    if recipe.loads_from and recipe.loads_from not in stacks.names():
        near = schema.nearest(recipe.loads_from, stacks.names(), 0.5)
        known = f"use {schema.either(stacks.names())}"
        hint = f"{near} {known}".strip()
        raise RecipeError(f"{where}: `loads_from` names no shipped stack: {recipe.loads_from}", hint=hint)
    words = [word for option in recipe.args for word in option]
    stray, args = options(words)
    if stray:
        raise RecipeError(f"{where}: `args` begins with {schema.show(stray[0])}, which is no option", hint="see --help")
    kept, dropped = without_owned(args)
    env, unset = env_without_owned(recipe.env)
    return ReadRecipe(replace(recipe, args=kept, env=env), changes=(*dropped, *unset))


def named(recipes: Sequence[ReadRecipe], wanted: str | None, where: str) -> ReadRecipe:
    """Return the one recipe of a file, or the one with the id `wanted`.

    Raises:
        RecipeError: there is none of that id, or several and none is wanted.
    """
    ids = [each.recipe.id for each in recipes]
    if wanted is None and len(recipes) == 1:
        return recipes[0]
    if wanted is None:
        raise RecipeError(f"{where} has {len(ids)} recipes", hint=f"name one with `--id`: {schema.either(ids)}")
    if wanted not in ids:
        hint = f"{schema.nearest(wanted, ids)} It has {schema.either(ids)}".strip()
        raise RecipeError(f"{where} has no recipe {schema.show(wanted)}", hint=hint)
    return recipes[ids.index(wanted)]
