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


# What the environment file of a node says of its link; docker takes the value of a name alone from the shell.
LINK_VARIABLES = (
    *("VLLM_HOST_IP", "VLLM_PORT", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME"),
    *("NCCL_IB_DISABLE", "NCCL_IB_HCA", "NCCL_IB_GID_INDEX", "UCX_NET_DEVICES"),
)
MASTER_PORT = 29501


class Rank(Struct, frozen=True):
    """What one node runs: `argv` begins with `vllm serve`; `docker` is the same in a container, or empty.

    `address`: the node's on the link; empty if there is only one.
    """

    address: str
    argv: Sequence[str]
    docker: Sequence[str]


class Command(Struct, frozen=True):
    """A recipe as a command of each rank, the head first; `added` is what sparkinstall says in it.

    `no_docker`: why there are no containers, or empty.
    """

    env: Mapping[str, str]
    ranks: Sequence[Rank]
    no_docker: str
    added: Sequence[Change]

    @property
    def head(self) -> Rank:
        """The first rank, which has the API."""
        return self.ranks[0]


def command(
    recipe: Recipe, port: int, home: Path, members: Sequence[str] = (), master_port: int = MASTER_PORT
) -> Command:
    """Render a recipe, which then listens on this machine only.

    Args:
        home: has the user's cache of models.
        members: the addresses of its nodes on the link, the head's first.
    """
    members = members or (("HEAD", *(f"WORKER-{at}" for at in range(1, recipe.nodes))) if recipe.nodes > 1 else ("",))
    own, env, added = _added(recipe, port)
    ranks = []
    for at, address in enumerate(members):
        rank = _rank(at, members, port, master_port)
        words = (word for each in (*options_of(recipe), *own, *rank) for word in each)
        argv = ("vllm", "serve", recipe.model, *words)
        ranks.append(Rank(address, argv, _docker(recipe, argv, env, home)))
    return Command(env, ranks, "" if recipe.image else "no image for this recipe is known by its digest", added)


def _rank(at: int, members: Sequence[str], port: int, master_port: int) -> tuple[Option, ...]:
    """Return what is only of that rank."""
    api: tuple[Option, ...] = (("--headless",),) if at else (("--host", "127.0.0.1"), ("--port", str(port)))
    if len(members) == 1:
        return api
    place = (("--nnodes", str(len(members))), ("--node-rank", str(at)))
    meets = (("--master-addr", members[0]), ("--master-port", str(master_port)))
    return (*api, ("--distributed-executor-backend", "mp"), *place, *meets)


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
    """Return the options that sparkinstall adds on all ranks, all variables, and what of both is added."""
    own: list[Option] = []
    changes = [Change(f"--host 127.0.0.1 --port {port}", "added", "the API listens on this machine only")]
    env = dict(recipe.env)
    if recipe.nodes > 1:
        changes.append(Change("--nnodes, --node-rank, --master-addr", "added", "vLLM's own processes are the ranks"))
        if not any("flashinfer-autotune" in key(each) for each in recipe.args):
            own.append(("--no-enable-flashinfer-autotune",))
            changes.append(Change(own[-1][0], "added", "ranks that tune in step have hung at the second start"))
        if _PATIENCE not in env:
            env[_PATIENCE] = "3600"
            changes.append(Change(f"{_PATIENCE}=3600", "added", "the first start on several nodes takes long"))
    return tuple(own), env, tuple(changes)


def _docker(recipe: Recipe, argv: Sequence[str], env: Mapping[str, str], home: Path) -> tuple[str, ...]:
    if not recipe.image:
        return ()
    cache = ("-v", f"{home}/.cache/huggingface:/root/.cache/huggingface")
    run = ["docker", "run", "--rm", "--gpus", "all", "--network", "host", "--ipc", "host", "--ulimit", "memlock=-1"]
    variables = [word for name, value in env.items() for word in ("-e", f"{name}={value}")]
    if recipe.nodes > 1:
        run += ["--device", "/dev/infiniband"]
        variables += [word for name in LINK_VARIABLES for word in ("-e", name)]
    # The entry point of other images prepares CUDA and then runs what follows.
    program = (
        ("--entrypoint", "vllm", recipe.image) if recipe.image.startswith(_OPENAI_IMAGE) else (recipe.image, "vllm")
    )
    return (*run, *cache, *variables, *program, *argv[1:])


def shell(words: Sequence[str]) -> str:
    """Return a command as a shell reads it, an option a line; so is the image of a container."""
    text = ""
    for word in words:
        gap = " \\\n    " if (is_option(word) or _DIGEST in word) and text else " " if text else ""
        text += gap + shlex.quote(word)
    return text
