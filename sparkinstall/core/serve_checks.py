"""What `serve` checks before anything is downloaded or started."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from msgspec.structs import replace

from sparkinstall.core import fit as fits
from sparkinstall.core.memory import RESERVE, Memory, memory_of
from sparkinstall.core.planned import InstalledVllm
from sparkinstall.core.recipe_list import fit as loads
from sparkinstall.core.serve_settings import Wanted
from sparkinstall.facts.units import show
from sparkinstall.journal.state_dir import Served
from sparkinstall.layout import VLLM_UNIT
from sparkinstall.models import Figure, ModelError
from sparkinstall.models.files import CONFIG, Files, read_object
from sparkinstall.models.hub import HubFiles
from sparkinstall.models.weights import INDEX, read_weights
from sparkinstall.node import Node
from sparkinstall.probes import Finding, Probe, failed, passed, skipped, warned
from sparkinstall.recipes import Change, Recipe
from sparkinstall.recipes.serve_options import options
from sparkinstall.stacks import Stack
from sparkinstall.system import Reader

_SHOWN = 5
_SHARE, _SHARE_OF_SEVERAL, _LEAST_SHARE = "0.85", "0.80", 0.1


def probes(node: Node, wanted: Wanted, say: Callable[[str], None] = lambda _: None) -> Iterator[Probe]:
    """Yield the checks of what is to be served on a node. `say` is told before one that takes long."""
    if wanted.recipe:
        yield Probe(
            "recipe", "a recipe for this stack and these nodes", lambda _: _recipe(wanted.recipe, node), "node",
            "vLLM does not load the model, or not as the recipe means it.",
        )  # fmt: skip
    if wanted.files:
        yield Probe(
            "model-files", "all files of the model", lambda _: _model_files(wanted.files), "node",
            "vLLM ends when it loads the model.",
        )  # fmt: skip
    if node.role != "worker":
        yield Probe(
            "port", "a free port for the API", partial(_port, node), "node", "vLLM ends after it has loaded the model."
        )
    yield Probe(
        "fit", "a model that fits", partial(_fit, wanted, node, say), "node", "The node runs out of memory and freezes."
    )


def _recipe(recipe: Recipe | None, node: Node) -> Finding:
    assert recipe is not None, "only with a recipe"
    spread = recipe.tensor_parallel * recipe.pipeline_parallel
    if spread != len(node.members if node.several else (node,)):
        return failed(f"it takes {spread} nodes", "`sparkinstall cluster` sets up several", "1 node")
    found = loads(recipe, node.stack)
    if recipe.expects:
        return failed(
            f"it takes {recipe.expects[0]} from its image", "put the file on this node, and name it in a recipe"
        )
    if found.loads == "patched_build":
        return failed(f"it needs a patched build: {found.why}", "choose another recipe: `sparkinstall recipes`")
    if found.loads == "other_stack":
        return failed(found.why, _stack_hint(found.stack), f"vLLM {node.stack.vllm}")
    if found.loads == "unknown":
        return warned(found.why, f"if vLLM ends, try a newer stack than {node.stack.name}")
    return passed(f"{recipe.id}: {_good(recipe, node.stack)}")


def _stack_hint(stack: str) -> str:
    return f"`sparkinstall all --stack {stack}`, then serve it" if stack else "no shipped stack has it yet"


def _good(recipe: Recipe, stack: Stack) -> str:
    known = recipe.good_on_gb10_from
    return f"reported good on a GB10 from vLLM {known}" if known else f"vLLM {stack.vllm} loads it"


def _model_files(files: Files | None) -> Finding:
    assert files is not None, "only with files"
    if missing := missing_files(files):
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        return failed(
            f"{files.place} lacks {', '.join(missing[:_SHOWN])}{more}",
            "copy the missing files there, or `sparkinstall models pull ORG/NAME`",
        )
    weights = read_weights(files) if any(name.endswith(".safetensors") for name in files.names()) else None
    return passed(f"{files.place}: {len(weights.files)} files of weights" if weights else f"{files.place} is complete")


def missing_files(files: Files) -> Sequence[str]:
    """Return the files that vLLM needs of a model and that are not there.

    Raises:
        ModelError: the folder or its index cannot be read.
    """
    names = files.names()
    weights = [name for name in names if name.endswith((".safetensors", ".bin", ".pt", ".gguf"))]
    shards = read_object(files, INDEX).get("weight_map") if INDEX in names else None
    wanted = {str(each) for each in shards.values()} if isinstance(shards, dict) else set()
    lacks = [] if CONFIG in names or "params.json" in names else [CONFIG]
    lacks += [] if weights or wanted else ["any file of weights"]
    return [*lacks, *sorted(wanted - set(names))]


def _port(node: Node, on: Reader) -> Finding:
    port, ours = node.config.serving.port, f"{VLLM_UNIT} has it, and is restarted"
    runs = show(on, VLLM_UNIT, "ActiveState")["ActiveState"] == "active"
    for line in on.ask("ss", "-Hltnp").out.splitlines():
        words = line.split()
        if len(words) > 3 and words[3].endswith(f":{port}"):
            who = re.search(r'\("([^"]+)",pid=(\d+)', line)
            if runs and (who is None or _is_in_unit(on, who[2])):
                return passed(f"{port}: {ours}")
            by = f" by {who[1]} (process {who[2]})" if who else ""
            return failed(f"port {port} is in use{by}", f"stop it, or choose another: `--set serving.port={port + 1}`")
    return passed(f"{port} is free")


def _is_in_unit(on: Reader, pid: str) -> bool:
    """Return whether a process is one of the running vLLM, or may be: that of another user is not shown."""
    try:
        groups = on.read(f"/proc/{pid}/cgroup")
    except OSError:
        return True
    return groups is None or f"/{VLLM_UNIT}".encode() in groups


def within_memory(wanted: Wanted, node: Node, on: Reader) -> Wanted:
    """Lower the share of the memory to what is available: vLLM ends if less is free than it is told to take.

    A recipe's share is what its source had free. Where the memory is not known, nothing is changed.
    """
    most = most_memory(node, on)
    if most is None:
        return wanted
    available = _available(node, on).available.value or 0
    why = f"{available / 1e9:.1f} GB are available, of which the system keeps some"
    served, changes = lowered(wanted.served, most, why, several=node.several)
    return replace(wanted, served=served, changes=(*wanted.changes, *changes))


def most_memory(node: Node, on: Reader) -> float | None:
    """Return the largest share of the memory that vLLM may take now, None if that is unknown."""
    memory = _available(node, on)
    available, total = memory.available.value, memory.total.value
    if available is None or not total:
        return None
    return math.floor(100 * (available - (RESERVE.value or 0)) / total) / 100


def lowered(served: Served, most: float, why: str, *, several: bool) -> tuple[Served, Sequence[Change]]:
    """Lower the share of what is served to `most`, and say why; of an absurdly small one nothing would start."""
    asked = served.settings.get("serving.memory") or (_SHARE_OF_SEVERAL if several else _SHARE)
    if not _LEAST_SHARE <= most < float(asked):
        return served, ()
    change = Change(f"serving.memory {asked}", "overridden", f"{most:g}: {why}")
    return replace(served, settings={**served.settings, "serving.memory": f"{most:g}"}), (change,)


def _available(node: Node, on: Reader) -> Memory:
    """Return the memory of this node; what the running vLLM holds becomes free."""
    memory = memory_of(on, None)
    if memory.available.value is None or show(on, VLLM_UNIT, "ActiveState")["ActiveState"] != "active":
        return memory
    return _without_running(memory, node)


def _fit(wanted: Wanted, node: Node, say: Callable[[str], None], on: Reader) -> Finding:
    memory = _available(node, on)
    if memory.available.value is None:
        return skipped(f"unknown: {memory.available.why}")
    if wanted.files is None and node.role == "worker":
        return skipped("the model is not here yet: the head's check counts")
    files = wanted.files or HubFiles(wanted.model, node.config.serving.revision or "")
    try:
        oracle = InstalledVllm(node, on, say).plan
        found = fits.fit(wanted.model, files, wanted.options, memory, node.stack.vllm, oracle=oracle)
    except ModelError as error:
        return skipped(f"unknown: {error.message}")
    need, there = found.memory.need.value, memory.available.value or 0
    size = f"{need / 1e9:.1f} GB needed, {there / 1e9:.1f} GB available{_counted(found)}" if need else ""
    if found.verdict == "does_not_fit":
        return failed(
            f"{found.why}: {size}" if size else found.why, f"`sparkinstall fit {wanted.served.name}` explains it"
        )
    if found.verdict == "unknown":
        return skipped(f"unknown: {found.why}")
    return passed(size)


def _counted(found: fits.FitReport) -> str:
    """Say how the KV cache was counted."""
    if found.asked:
        return f", the KV cache as vLLM {found.vllm} plans it"
    return f" (estimate: {found.not_asked})" if found.not_asked else " (estimate)"


def _without_running(memory: Memory, node: Node) -> Memory:
    """Return the memory without the vLLM that is replaced, which may hold its share of it."""
    total = memory.total.value or 0
    share = float(_last(node, "--gpu-memory-utilization") or node.config.serving.memory or _SHARE)
    freed = min(total, (memory.available.value or 0) + int(share * total))
    return Memory(Figure(freed, "estimate", "MemAvailable, and what the running vLLM may hold"), memory.total)


def _last(node: Node, name: str) -> str:
    named = [each for each in options(node.config.serving.arguments)[1] if each[0] == name]
    return named[-1][1] if named and named[-1][1:] else ""
