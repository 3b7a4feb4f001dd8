"""The model that `serve` names, in the hub's cache: downloaded if it is not there, and undone only if it was.

Not among the other steps: what knows the cache of models is above them.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from msgspec import Struct

from sparkinstall.core import models
from sparkinstall.core.model_cache import ModelFolder, Revision, folders
from sparkinstall.errors import Problem
from sparkinstall.models.hub import cache_folder, cached, is_name
from sparkinstall.node import Node
from sparkinstall.recipes.serve_options import draft_of, options
from sparkinstall.resources import Drift, Ok, Resource, State
from sparkinstall.steps import Step
from sparkinstall.system import Reader, System, Undo, Undone, undoes

_SHOWN = 3


class ModelStep(Step):
    name = "model"
    why = "the model that `serve` names, and the one that drafts for it"
    phase = "build"
    impact = "vLLM ends when it loads the model."

    def wanted(self, node: Node) -> bool:
        return bool(list(self.resources(node)))

    def resources(self, node: Node) -> Iterable[Resource]:
        serving = node.config.serving
        named = serving.model or "", serving.revision, serving.recipe, serving.arguments
        yield from (Snapshot(*each) for each in pinned(*named))


def pinned(model: str, revision: str | None, recipe: str | None, arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the models of the hub that a service needs with their commits: its own, and the one that drafts.

    A commit is pinned by `serve` only; of other models the user takes care.
    """
    if revision is not None and is_name(model):
        yield model, revision
    draft = draft_of(options(arguments)[1]) if recipe else None
    if draft and is_name(draft.model) and re.fullmatch("[0-9a-f]{40}", draft.revision or ""):
        yield draft.model, str(draft.revision)


class Snapshot(Struct, frozen=True):
    """A model at one commit in the user's cache of the hub, with all files."""

    model: str
    commit: str

    @property
    def key(self) -> str:
        return f"model:{self.model}"

    def node_only(self, on: Reader) -> str:
        del on
        return f"downloading {self.model}"

    def check(self, on: Reader) -> State:
        del on
        found = revision(self.model, self.commit)
        if found is None:
            return Drift(f"download {self.model} at {self.commit[:12]}")
        if found.complete or (found.complete is None and cached(self.model, self.commit)):
            return Ok(f"{found.files} files, {found.size / 1e9:.2f} GB")
        return Drift(f"download what {self.model} at {self.commit[:12]} lacks: {_some(found.missing)}")

    def apply(self, on: System) -> None:
        folder = ModelFolder(cache_folder(), self.model)
        # By its path: the cache of who undoes it may be another, where the same model is their own.
        on.promise(Undo("model", str(folder.path), {"there": folder.exists()}, {"commit": self.commit}))
        tell = lambda done, total: on.progress(done, total, "bytes")  # noqa: E731
        try:
            models.pull(self.model, self.commit, models.Dialog(tell, _ignored))
        except Problem as problem:
            if (found := revision(self.model, self.commit)) and found.missing:
                problem.cause = f"{problem.cause or problem.message}; still missing: {_some(found.missing)}"
            raise


def _ignored(sentence: str) -> None:
    del sentence


def revision(model: str, commit: str) -> Revision | None:
    """Return what the cache has of a model at a commit."""
    folder = ModelFolder(cache_folder(), model)
    return next((each for each in folder.revisions() if each.commit == commit), None)


def _some(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return ", ".join(paths[:_SHOWN]) + more if paths else "some of its files"


@undoes("model")
def remove(records: Sequence[Undo], on: System) -> Undone:
    """Remove a model that was brought for `serve`: not one of which anything was there before, or has come since."""
    del on
    subject, before = records[0].subject, records[0].before
    folder = next((each for each in folders(Path(subject).parent) if str(each.path) == subject), None)
    if before.get("there") or folder is None:
        return Undone(subject, "nothing")
    if folder.path.is_symlink():
        return Undone(subject, "kept", "it is a link, so it was moved to another place since")
    ours = {record.after.get("commit") for record in records}
    if others := sorted(each.commit[:12] for each in folder.revisions() if each.commit not in ours):
        return Undone(subject, "kept", f"it has a revision that was not brought by sparkinstall: {', '.join(others)}")
    with folder.locked(lambda: None):
        folder.remove()
    return Undone(subject, "removed", "")
