"""Reader of the serving recipes of NVIDIA NemoClaw (managed-inference): lists of names and values."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from sparkinstall.recipes import Change, Option, ReadRecipe
from sparkinstall.recipes.readers.assemble import Draft, Place, assembled, line, mapping, number, texts
from sparkinstall.recipes.serve_options import full_name

FORMAT = "NVIDIA/NemoClaw"
_REFERENCE = re.compile(r"[A-Za-z0-9][\w.-]*")
_CONTAINER = ("sharedMemoryBytes", "ulimits", "devices", "ipcMode", "networkMode", "modelCache", "temporaryFilesystems")

# From a reference to a model, the data of its file in the folder that the user named; None if there is none.
Models = Callable[[str], Mapping[str, Any] | None]


def read(data: Mapping[str, Any], models: Models, place: Place) -> tuple[ReadRecipe, ...]:
    """Read a recipe.

    Raises:
        RecipeError: it is something else than a recipe for vLLM, or names no model.
    """
    kind = str(data.get("kind", ""))
    if kind != "ServingRecipe":
        raise place.error(f"it is a {line(kind) or 'file'} of NemoClaw, not a ServingRecipe")
    spec = mapping(data.get("spec"), "spec", place)
    if spec.get("backend") != "vllm":
        raise place.error(f"it is for {line(spec.get('backend', 'another engine'))}, not for vLLM")
    runtime = mapping(spec.get("runtime"), "spec.runtime", place)
    execution = mapping(spec.get("execution"), "spec.execution", place)
    model = _model(spec, models, place)
    metadata = mapping(data.get("metadata"), "metadata", place)
    draft = Draft(
        format=FORMAT,
        id=str(metadata.get("id") or place.name.rpartition(".")[0]),
        model=str(model.get("id") or ""),
        args=(*_parallel(execution), *_arguments(spec, place), *_served_name(model)),
        env=texts(runtime.get("environment"), "spec.runtime.environment", place),
        revision=str(model.get("revision") or ""),
        bytes=number(str(model.get("downloadSizeBytes") or "")),
        nodes=number(str(execution.get("nodeCount") or "")),
        image=str(runtime.get("image") or ""),
        notes=[str(metadata["displayName"])] if metadata.get("displayName") else [],
    )
    _prepared(draft, model)
    draft.container = [f"image {line(draft.image)}", *(each for each in _CONTAINER if runtime.get(each))]
    owned = [each for each in ("distributedExecutorBackend", "rendezvousPort") if execution.get(each)]
    draft.changes += [
        Change(f"{each} {line(execution[each])}", "dropped", "sparkinstall starts the ranks of several nodes itself")
        for each in owned
    ]
    return (assembled(draft, place),)


def _model(spec: Mapping[str, Any], models: Models, place: Place) -> Mapping[str, Any]:
    if found := mapping(spec.get("model"), "spec.model", place):
        return found
    reference = str(spec.get("modelRef") or "")
    if _REFERENCE.fullmatch(reference) and (file := models(reference)):
        return mapping(file.get("spec"), "spec of the model", place)
    expected = str(mapping(spec.get("readiness"), "spec.readiness", place).get("expectedModel") or "")
    if "/" in expected:
        return {"id": expected}
    hint = "name the folder managed-inference, which has `models` and `recipes`"
    raise place.error(f"its model is in another file: {line(reference) or 'not named'}", hint)


def _prepared(draft: Draft, model: Mapping[str, Any]) -> None:
    preparation = model.get("preparation")
    reference = preparation.get("ref") if isinstance(preparation, Mapping) else preparation
    if reference and reference != "none/v1":
        draft.patched.append(f"model.preparation {line(reference)}, which changes the image {line(draft.image)}")


def _parallel(execution: Mapping[str, Any]) -> tuple[Option, ...]:
    sizes = {"--tensor-parallel-size": "tensorParallelSize", "--pipeline-parallel-size": "pipelineParallelSize"}
    return tuple((option, str(execution[name])) for option, name in sizes.items() if execution.get(name))


def _arguments(spec: Mapping[str, Any], place: Place) -> tuple[Option, ...]:
    """Return the arguments: a name without a value is a switch."""
    serve = mapping(spec.get("serve"), "spec.serve", place)
    found: list[Option] = []
    for at, each in enumerate(serve.get("arguments") or ()):
        argument = texts(each, f"spec.serve.arguments[{at}]", place)
        name = argument.get("name", "")
        if not name.startswith("-"):
            raise place.error(f"`spec.serve.arguments[{at}].name` must be an option, such as --max-num-seqs")
        found.append((full_name(name), argument["value"]) if "value" in argument else (full_name(name),))
    return tuple(found)


def _served_name(model: Mapping[str, Any]) -> tuple[Option, ...]:
    name = model.get("servedName")
    return (("--served-model-name", str(name)),) if name and name != model.get("id") else ()
