"""What `serve RECIPE|MODEL` means as settings: one more layer, below all that the user sets."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from sparkinstall import given
from sparkinstall.core.fit import FitOptions, options_of_recipe, with_draft
from sparkinstall.core.model_cache import ModelFolder
from sparkinstall.core.recipe_settings import cache_variables, settings_of
from sparkinstall.core.session import IDENTITY, Session
from sparkinstall.errors import BadConfig, BadUsage
from sparkinstall.journal.state_dir import Served
from sparkinstall.models import ModelError
from sparkinstall.models.files import CONFIG, Files, LocalFiles, read_object
from sparkinstall.models.hub import cache_folder, cached, is_name
from sparkinstall.models.layout import layout_of
from sparkinstall.models.listing import MAIN, listing
from sparkinstall.recipes import Change, Recipe, serve_options
from sparkinstall.recipes.catalogue import shipped
from sparkinstall.recipes.readers import recipes_of
from sparkinstall.resources.stale_services import is_ours
from sparkinstall.schema import show

REMOTE_CODE = "--trust-remote-code"
_RECIPES = (".yaml", ".yml")
# Without a recipe, sparkinstall's own default for one node; a model may allow less.
_LONGEST = 32768


class Wanted(Struct, frozen=True):
    """What is to be served.

    `files`: those of the model that are on this node; None: it must be downloaded. `changes`: what of a recipe's file
    is not in its settings.
    """

    served: Served
    model: str
    recipe: Recipe | None
    files: Files | None
    options: FitOptions
    changes: Sequence[Change] = ()


class Named(Struct, frozen=True):
    """What a name means before a node is asked: a recipe, or else a model. `changes`: as in `Wanted`."""

    name: str
    recipe: Recipe | None = None
    changes: tuple[Change, ...] = ()
    trusts: bool = False


class Order(Struct, frozen=True):
    """What several nodes are to serve together, as the head has found it: the same for all of them."""

    served: Served
    model: str
    recipe: Recipe | None
    options: FitOptions

    def here(self) -> Wanted:
        """Return it with the files of the model that are on this node."""
        if self.model.startswith("/"):
            files: Files | None = LocalFiles(Path(self.model))
        else:
            files = cached(self.model, str(self.served.settings["serving.revision"]))
        return Wanted(self.served, self.model, self.recipe, files, self.options)


def wanted(name: str, wanted_id: str | None = None, *, trusts: bool = False) -> Wanted:
    """Find what a name means: a recipe, its file, the folder of a model, or a model of the hub.

    Args:
        wanted_id: which recipe of a file with several.
        trusts: the user agrees to code of the model's own, which a recipe asks for.

    Raises:
        RecipeError, ModelError: there is none, or it cannot be used.
        BadUsage: it asks for what the user has not agreed to.
    """
    return found(named(name, wanted_id, trusts=trusts))


def found(of: Named) -> Wanted:
    """Find the model of a recipe, or of that name, on this node or the hub.

    Raises:
        ModelError, HubRefused, NotDownloaded: there is none, or the hub does not tell its commit.
    """
    return _of_recipe(of, of.recipe) if of.recipe else _of_model(of.name)


def spread(of: Wanted, session: Session) -> Wanted:
    """Return it as this node and the others of its cluster serve it.

    vLLM's own processes meet without Ray, unless the recipe asks for it, or this node has Ray already, or a token to
    join one. A model without a recipe is spread over all nodes.
    """
    node, served = session.node, of.served
    if not node.several:
        return of
    if not (node.token_file or is_ours(session.system, node.ray_unit)):
        served = replace(served, settings={"cluster.executor": "mp", **served.settings})
    options = of.options if of.recipe else replace(of.options, tensor_parallel=len(node.members))
    return replace(of, served=served, options=options)


def named(name: str, wanted_id: str | None = None, *, trusts: bool = False) -> Named:
    """Read what a name means of files that the user has here; the model is not looked for.

    Raises:
        as `wanted`.
    """
    if name.endswith(_RECIPES) or any(each.id == name for each in shipped()):
        read = recipes_of(name, wanted_id, only_one=True).recipes[0]
        _require_trust(read.recipe, trusts)
        return Named(name, read.recipe, read.changes, trusts)
    if wanted_id is not None:
        raise BadUsage("--id is for a file with several recipes", hint="omit it, or name such a file")
    if trusts:
        raise BadUsage(
            f"{REMOTE_CODE} is for a recipe that asks for it",
            hint="if you have read the model's code, write a recipe of your own with it (docs/recipes.md)",
        )
    if not (is_path(name) or is_name(name)):
        # It is neither; the recipes know what it is near to.
        recipes_of(name)
    return Named(name)


def _of_recipe(of: Named, recipe: Recipe) -> Wanted:
    model = _folder(recipe.model) if recipe.model.startswith(("/", "~")) else recipe.model
    settings = dict(settings_of(recipe, model))
    files = _files(model, recipe.revision, settings)
    draft = serve_options.draft_of(recipe.args)
    if draft and is_name(draft.model):
        commit = _commit(draft.model, draft.revision or MAIN)
        settings["serving.arguments"] = serve_options.with_draft_at(settings["serving.arguments"], commit)
    options = replace(with_draft(options_of_recipe(recipe), recipe), remote_code=of.trusts)
    return Wanted(Served(recipe.id, settings), model, recipe, files, options, of.changes)


def _files(model: str, revision: str | None, settings: dict[str, Any]) -> Files | None:
    """Return the files of a model that are here, and pin the commit of one of the hub; None: some are missing.

    Raises:
        HubRefused, NotDownloaded: only the hub knows the commit, and does not tell it.
    """
    if model.startswith("/"):
        return LocalFiles(Path(model))
    if not is_name(model):
        raise ModelError(f"{model} is neither a folder nor ORG/NAME of the hub", hint="`serve` needs one of them")
    settings["serving.revision"] = commit = _commit(model, revision or MAIN)
    return cached(model, commit)


def _commit(model: str, revision: str) -> str:
    if re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    known = ModelFolder(cache_folder(), model).revisions()
    return next((each.commit for each in known if revision in each.refs), "") or listing(model, revision).commit


def _require_trust(recipe: Recipe, trusts: bool) -> None:
    # vLLM takes any beginning of an option that is no other's.
    asks = any(REMOTE_CODE.startswith(serve_options.key(each).partition(".")[0]) for each in recipe.args)
    if asks and not trusts:
        raise BadUsage(
            f"the recipe {recipe.id} runs code from the repository {recipe.model} ({REMOTE_CODE})",
            cause="that code does on this node whatever it wants, as your user",
            hint=f"read it first; if you agree, add {REMOTE_CODE}",
        )
    if trusts and not asks:
        raise BadUsage(f"the recipe {recipe.id} does not ask for {REMOTE_CODE}", hint=f"omit {REMOTE_CODE}")


def _of_model(name: str) -> Wanted:
    model = _folder(name) if is_path(name) else name
    settings: dict[str, Any] = {"serving.model": model, "serving.recipe": None, "serving.revision": None}
    settings["serving.env"] = cache_variables(model)
    files = _files(model, None, settings)
    longest = _longest(files) if files else None
    if longest and longest < _LONGEST:
        settings["serving.max_model_len"] = longest
    return Wanted(Served(name, settings), model, None, files, FitOptions(context=min(longest or _LONGEST, _LONGEST)))


def require_known(name: str) -> None:
    """Check that a name can be that of a recipe or a model; the hub is not asked.

    Raises:
        RecipeError, ModelError: it cannot.
    """
    if name.endswith(_RECIPES) or not (is_path(name) or is_name(name)):
        recipes_of(name)
    elif is_path(name):
        _folder(name)


def is_path(name: str) -> bool:
    """Whether a name is that of a folder, not of a model of the hub: as for vLLM and `fit`, a folder that exists is."""
    return name.startswith(("/", "./", "../", "~")) or name in (".", "..") or Path(name).is_dir()


def _folder(name: str) -> str:
    path = given.absolute(name, "the model", ModelError)
    if not path.is_dir():
        raise ModelError(f"there is no folder {path}", hint="name the folder with the model's config.json")
    return str(path.resolve())


def _longest(files: Files) -> int | None:
    """Return the longest sequence that a model allows, None if its config.json does not say."""
    if CONFIG not in files.names():
        return None
    return layout_of(read_object(files, CONFIG), None).context


def require_decided(session: Session, served: Served) -> None:
    """Check that what is to be served is what the settings say in the end.

    Raises:
        BadConfig: a setting of the user's says otherwise.
    """
    settings = session.settings()
    for name in IDENTITY:
        value, source = settings[name].value, settings[name].source
        if value != served.settings.get(name):
            raise BadConfig(
                f"`{name}` is {show(value)} in {source}, which wins over `serve {served.name}`",
                hint="remove it there: `serve` decides what is served",
            )


def overridden(session: Session, served: Served) -> tuple[Change, ...]:
    """Return what the user's own settings replace."""
    changes: list[Change] = []
    for name, setting in session.settings().items():
        if name in served.settings and setting.source != f"`serve {served.name}`":
            before, after = served.settings[name], setting.value
            if isinstance(before, list):
                changes += _replaced(name, before, after, setting.source)
            elif before != after:
                changes.append(Change(f"{name} {before}", "overridden", f"{after} in {setting.source}"))
    return tuple(changes)


def _replaced(name: str, before: Sequence[str], after: Sequence[str], source: str) -> Iterator[Change]:
    if name == "serving.env":
        gone = [each for each in before if each not in after]
    else:
        kept = set(serve_options.options(after)[1])
        gone = [" ".join(each) for each in serve_options.options(before)[1] if each not in kept]
    for each in gone:
        yield Change(each, "overridden", f"`{name}` in {source}")
