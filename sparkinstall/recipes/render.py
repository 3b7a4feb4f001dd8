"""A recipe as a command: the words of `vllm serve`, its variables, and the same in a container."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from sparkinstall.recipes import Change, Option, Recipe
from sparkinstall.recipes.serve_options import is_option, key, last_of_each

_PATIENCE = "VLLM_ENGINE_READY_TIMEOUT_S"
_DIGEST = "@sha256:"
_OPENAI_IMAGE = "vllm/vllm-openai"


class Command(Struct, frozen=True):
    """A recipe as a command. `argv` begins with `vllm serve`; `added` is what sparkinstall says in it.

    `docker` is the same in a container; [] with the reason in `no_docker`.
    """

    argv: Sequence[str]
    env: Mapping[str, str]
    docker: Sequence[str]
    no_docker: str
    added: Sequence[Change]


def command(recipe: Recipe, port: int, home: Path) -> Command:
    """Render a recipe, which then listens on this machine only; `home` has the user's cache of models."""
    own, env, added = _added(recipe, port)
    argv = ("vllm", "serve", recipe.model, *(word for each in (*options_of(recipe), *own) for word in each))
    docker, why = _docker(recipe, argv, env, home)
    return Command(argv, env, docker, why, added)


def options_of(recipe: Recipe) -> tuple[Option, ...]:
    """Return all options of a recipe, those of its fields first."""
    fields = {
        "--revision": recipe.revision,
        "--tensor-parallel-size": recipe.tensor_parallel if recipe.tensor_parallel > 1 else None,
        "--pipeline-parallel-size": recipe.pipeline_parallel if recipe.pipeline_parallel > 1 else None,
        "--gpu-memory-utilization": None if recipe.memory is None else f"{recipe.memory:g}",
        "--max-model-len": recipe.context,
        "--max-num-seqs": recipe.sequences,
        "--max-num-batched-tokens": recipe.batched_tokens,
        "--tool-call-parser": recipe.tool_parser,
        "--reasoning-parser": recipe.reasoning_parser,
    }
    named: list[Option] = [(name, str(value)) for name, value in fields.items() if value is not None]
    if recipe.tool_parser:
        named.append(("--enable-auto-tool-choice",))
    return last_of_each((*named, *recipe.args))


def _added(recipe: Recipe, port: int) -> tuple[tuple[Option, ...], dict[str, str], tuple[Change, ...]]:
    """Return the options that sparkinstall adds, all variables, and what of both is added."""
    own: list[Option] = [("--host", "127.0.0.1"), ("--port", str(port))]
    changes = [Change(f"--host 127.0.0.1 --port {port}", "added", "the API listens on this machine only")]
    env = dict(recipe.env)
    if recipe.nodes > 1:
        if not any("flashinfer-autotune" in key(each) for each in recipe.args):
            own.append(("--no-enable-flashinfer-autotune",))
            changes.append(Change(own[-1][0], "added", "ranks that tune in step have hung at the second start"))
        if _PATIENCE not in env:
            env[_PATIENCE] = "3600"
            changes.append(Change(f"{_PATIENCE}=3600", "added", "the first start on several nodes takes long"))
    return tuple(own), env, tuple(changes)


def _docker(recipe: Recipe, argv: Sequence[str], env: Mapping[str, str], home: Path) -> tuple[tuple[str, ...], str]:
    if recipe.nodes > 1:
        return (), f"it takes {recipe.nodes} nodes: each container would need the settings of its own node's link"
    if not recipe.image:
        return (), "no image for this recipe is known by its digest"
    cache = ("-v", f"{home}/.cache/huggingface:/root/.cache/huggingface")
    run = ("docker", "run", "--rm", "--gpus", "all", "--network", "host", "--ipc", "host", "--ulimit", "memlock=-1")
    variables = tuple(word for name, value in env.items() for word in ("-e", f"{name}={value}"))
    # The entry point of other images prepares CUDA and then runs what follows.
    program = (
        ("--entrypoint", "vllm", recipe.image) if recipe.image.startswith(_OPENAI_IMAGE) else (recipe.image, "vllm")
    )
    return (*run, *cache, *variables, *program, *argv[1:]), ""


def shell(words: Sequence[str]) -> str:
    """Return a command as a shell reads it, an option a line; so is the image of a container."""
    text = ""
    for word in words:
        gap = " \\\n    " if (is_option(word) or _DIGEST in word) and text else " " if text else ""
        text += gap + shlex.quote(word)
    return text
