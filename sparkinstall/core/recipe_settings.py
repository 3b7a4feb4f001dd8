"""A recipe as settings, and as the units of systemd that follow from them."""

from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from sparkinstall import given
from sparkinstall.core.session import Session, Target, open_session
from sparkinstall.journal.state_dir import Served
from sparkinstall.models.hub import cache_folder
from sparkinstall.node import Node
from sparkinstall.recipes import Recipe, serve_options
from sparkinstall.recipes.render import options_of
from sparkinstall.resources.systemd import UnitFile
from sparkinstall.steps.serving import Serving

_LEAST_SHARE, _MOST_SHARE = 0.1, 0.95
# Options of a recipe that are settings of their own, or that follow from the nodes.
_SETTINGS = ("--revision", "--gpu-memory-utilization", "--tensor-parallel-size", "--pipeline-parallel-size")


def settings_of(recipe: Recipe, model: str) -> Iterator[tuple[str, Any]]:
    """Yield what a recipe sets."""
    yield "serving.model", model
    yield "serving.recipe", recipe.id
    yield "serving.revision", recipe.revision
    if recipe.executor and recipe.nodes > 1:
        yield "cluster.executor", recipe.executor
    if recipe.memory is not None:
        share = min(max(recipe.memory, _LEAST_SHARE), _MOST_SHARE)
        yield "serving.memory", f"{round(share, 2):g}"
    apart: tuple[str, ...] = _SETTINGS
    if isinstance(recipe.context, int):
        yield "serving.max_model_len", recipe.context
        apart = (*apart, "--max-model-len")
    kept = (each for each in options_of(recipe) if serve_options.key(each) not in apart)
    yield "serving.arguments", [word for option in kept for word in option]
    yield "serving.env", [*(f"{name}={value}" for name, value in recipe.env.items()), *cache_variables(model)]


def cache_variables(model: str) -> list[str]:
    """Return the variable that leads the service to the user's cache of the hub, if it is not in its usual place."""
    cache, usual = cache_folder(), given.home() / ".cache/huggingface/hub"
    return [] if model.startswith("/") or cache == usual else [f"HF_HUB_CACHE={cache}"]


class RankUnit(Struct, frozen=True):
    """The unit file of a node: its path, and what it contains. `address`: as in `Rank`."""

    address: str
    path: str
    text: str


def members_of(recipe: Recipe, node: Node) -> Sequence[str]:
    """Return the addresses of a recipe's nodes on the link: this cluster's if it has as many, else the default ones."""
    if recipe.nodes == 1:
        return ("",)
    if node.several and len(node.members) == recipe.nodes:
        return node.members
    first = IPv4Address(node.config.cluster.head)
    return [str(first + at) for at in range(recipe.nodes)]


def units_of(recipe: Recipe, target: Target, session: Session) -> Sequence[RankUnit]:
    """Return the unit of each node, as `serve` writes it with the settings that the target has otherwise."""
    served = Served(recipe.id, dict(settings_of(recipe, recipe.model)))
    members = members_of(recipe, session.node)
    found = []
    for at, address in enumerate(members):
        opened = open_session(replace(target, served=served, role=_role(members, at, session.node, recipe)))
        for each in Serving().resources(opened.node):
            if isinstance(each, UnitFile) and isinstance(content := each.rendered(opened.system), bytes):
                found.append(RankUnit(address, opened.system.real(each.path), content.decode()))
    return found


def _role(members: Sequence[str], at: int, node: Node, recipe: Recipe) -> dict[str, Any]:
    if len(members) == 1:
        return {"cluster.role": "single"}
    role = "worker" if at else "head"
    # mp, unless the recipe or this cluster has Ray.
    executor = recipe.executor or (node.config.cluster.executor if node.several else "mp")
    addresses = {"cluster.head": members[0], "cluster.workers": list(members[1:]), "cluster.address": members[at]}
    return {"cluster.role": role, "cluster.executor": executor, **addresses}
