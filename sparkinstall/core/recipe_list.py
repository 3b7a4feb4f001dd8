"""The recipes: which of them the vLLM of a stack can load, and whether their weights fit into a node's memory."""

import re
from collections.abc import Iterable, Sequence
from typing import Literal

from msgspec import Struct

from sparkinstall import stacks
from sparkinstall.core.memory import OVERHEAD, RESERVE, memory_of
from sparkinstall.facts import vllm_releases
from sparkinstall.facts.vllm_options import Refusal, refusals
from sparkinstall.models import Figure
from sparkinstall.node import Node
from sparkinstall.recipes import Change, ReadRecipe, Recipe, Speed
from sparkinstall.recipes.render import options_of
from sparkinstall.recipes.serve_options import key
from sparkinstall.system import Reader

Loads = Literal["loads", "other_stack", "patched_build", "unknown"]
Room = Literal["fits", "does_not_fit", "reported", "unknown"]
"""Whether the weights fit into a node's memory; `reported`: their size is not known, or a patched build keeps a part of
them on the disk, but others have run them."""

# The first shipped stack whose vLLM has the method; `mtp` is in all of them.
_METHODS = {"dflash": "0.22.1", "dspark": "0.29.0"}


class Fit(Struct, frozen=True):
    """Whether a stack can load a recipe; `stack`: the one that can, where it is another. "": none shipped."""

    loads: Loads
    stack: str = ""
    why: str = ""


class ListedRecipe(Struct, frozen=True):
    """A recipe in a list. `good_on_gb10`: it was reported good there with this stack's release or an older one.

    `stack`: the one that loads it, "" if none of the shipped ones does.
    `need`: bytes that each node needs beside the KV cache, None if the size of the weights is not known.
    """

    id: str
    model: str
    loads: Loads
    stack: str
    fits: Room
    need: int | None
    nodes: int
    context: int | str | None
    bytes: int | None
    good_on_gb10: bool
    needs_build: str | None
    speed: Speed | None


class RecipeList(Struct, frozen=True):
    """Result of `recipes list`: for which stack and release of vLLM, and the recipes; those that run come first.

    `memory`: what a node has available for vLLM and the system.
    """

    stack: str
    vllm: str
    memory: Figure
    recipes: Sequence[ListedRecipe]


def recipe_list(recipes: Iterable[Recipe], stack: stacks.Stack, memory: Figure) -> RecipeList:
    """Judge each recipe for a stack and the memory of each node."""
    order: tuple[Loads, ...] = ("loads", "other_stack", "unknown", "patched_build")
    listed = [_listed(each, stack, memory) for each in recipes]
    listed.sort(key=lambda each: (order.index(each.loads), each.nodes, each.fits == "does_not_fit"))
    return RecipeList(stack.name, stack.vllm, memory, listed)


def memory_for_models(on: Reader) -> Figure:
    """Return what this node has available now; on another machine, all memory of a Spark."""
    memory = memory_of(on, None)
    return memory.total if memory.available.value is None else memory.available


def _listed(recipe: Recipe, stack: stacks.Stack, memory: Figure) -> ListedRecipe:
    found, good, need = fit(recipe, stack), recipe.good_on_gb10_from, _need(recipe)
    return ListedRecipe(
        id=recipe.id,
        model=recipe.model,
        loads=found.loads,
        stack=stack.name if found.loads == "loads" else found.stack,
        fits=_room(recipe, need, memory),
        need=need,
        nodes=recipe.nodes,
        context=recipe.context,
        bytes=recipe.bytes,
        good_on_gb10=bool(good) and release(stack.vllm) >= release(good or ""),
        needs_build=recipe.needs_build,
        speed=typical_speed(recipe),
    )


def _need(recipe: Recipe) -> int | None:
    """Return the bytes that each node needs beside the KV cache."""
    if recipe.bytes is None:
        return None
    return -(-recipe.bytes // recipe.nodes) + (OVERHEAD.value or 0) + (RESERVE.value or 0)


def _room(recipe: Recipe, need: int | None, memory: Figure) -> Room:
    if need is not None and memory.value is not None and need <= memory.value:
        return "fits"
    if need is not None and not recipe.needs_build:
        return "does_not_fit"
    # A patched build may keep a part of the weights on the disk.
    return "reported" if recipe.speed or recipe.good_on_gb10_from else "unknown"


def typical_speed(recipe: Recipe) -> Speed | None:
    """Return the reported speed of one stream, or else the first one."""
    return next((each for each in recipe.speed if each.streams == 1), next(iter(recipe.speed), None))


def fit(recipe: Recipe, stack: stacks.Stack) -> Fit:
    """Judge whether the vLLM of a stack has what a recipe needs."""
    if recipe.needs_build:
        return Fit("patched_build", why=recipe.needs_build)
    least = _least(recipe)
    if not least:
        return Fit("unknown", why="the recipe does not say which vLLM it needs")
    if release(stack.vllm) >= release(least):
        return Fit("loads", why="" if recipe.loads_from else f"the file asks for vLLM {least} or newer")
    others = [name for name in stacks.names() if release(name) >= release(least)]
    return Fit("other_stack", others[0] if others else "", f"it needs vLLM {least} or newer")


def _least(recipe: Recipe) -> str:
    known = [recipe.loads_from, recipe.needs_vllm, _METHODS.get(_method(recipe))]
    return max(filter(None, known), key=release, default="")


def _method(recipe: Recipe) -> str:
    """Return the method of speculative decoding, which JSON or a dotted option names."""
    for each in recipe.args:
        if key(each) == "--speculative-config.method" and each[1:]:
            return each[1]
        if key(each) == "--speculative-config" and each[1:]:
            found = re.search(r'"method"\s*:\s*"(\w+)"', each[1])
            return found[1] if found else ""
    return ""


def release(version: str) -> tuple[int, ...]:
    """Return the numbers of a release, to compare two of them."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


class ShownRecipe(Struct, frozen=True):
    """A recipe with where it is from, what of its file is not in it, and whether the stack of that name can load it.

    `refused`: options, values and variables that the stack's vLLM does not take.
    """

    stack: str
    recipe: Recipe
    format: str
    changes: Sequence[Change]
    fit: Fit
    refused: Sequence[Refusal]


class ShownRecipes(Struct, frozen=True):
    """Result of `recipes show`: the recipes, and files of a folder that have none."""

    recipes: Sequence[ShownRecipe]
    skipped: Sequence[Change]


def shown(read: ReadRecipe, node: Node, on: Reader) -> ShownRecipe:
    """Add the judgement for a node's stack."""
    refused = refused_of(read.recipe, node, on)
    return ShownRecipe(node.stack.name, read.recipe, read.format, read.changes, fit(read.recipe, node.stack), refused)


def refused_of(recipe: Recipe, node: Node, on: Reader) -> Sequence[Refusal]:
    """Return what a node's vLLM does not take; empty if what it takes is not known."""
    known = vllm_releases.known(node, on)
    words = [word for option in options_of(recipe) for word in option]
    return refusals(words, recipe.env, known.declared, vllm_releases.shipped()) if known else ()
