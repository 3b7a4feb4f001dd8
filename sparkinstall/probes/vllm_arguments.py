"""Whether the vLLM of a node takes the arguments and variables that it is started with, before it is started."""

from collections.abc import Callable, Sequence
from functools import partial

from sparkinstall.facts import units, vllm_config_file, vllm_releases
from sparkinstall.facts.vllm_options import Declared, Refusal, refusals
from sparkinstall.layout import VLLM_UNIT, unit_path
from sparkinstall.node import Node
from sparkinstall.probes import Finding, Probe, failed, passed, skipped
from sparkinstall.services import VLLM
from sparkinstall.system import Reader

NAME = "vllm-arguments"
_SHOWN = 6


def probe(node: Node, arguments: Sequence[str]) -> Probe:
    """Return the probe of these arguments of `vllm serve MODEL`, and of the variables of `systemctl edit vllm`."""
    return Probe(
        NAME,
        "arguments and variables of vLLM",
        partial(_look, node, tuple(arguments)),
        "node",
        "vLLM ends when it is started, in a loop, or ignores what was meant.",
    )


def _look(node: Node, arguments: tuple[str, ...], on: Reader) -> Finding:
    known = vllm_releases.known(node, on)
    if known is None:
        return skipped(f"stack {node.stack.name} has a vLLM of its own, which is not here yet")
    own = (each.partition("=")[0] for each in node.config.serving.env)
    variables = [*own, *units.own_variables(on, f"{unit_path(VLLM_UNIT)}.d")]
    # This machine is not the node in a rehearsal; with Ray, only the head reads files.
    is_here = VLLM.wanted(node) and not on.rehearsal
    exists = partial(_exists, on) if is_here else None
    content = _content(on, vllm_config_file.named_in(arguments)) if is_here else None
    wrong = _refusals(arguments, variables, known.declared, exists, content)
    if wrong:
        return failed(_told(wrong), _where(variables), f"what {known.source} declares")
    given = [*(word for word in arguments if word.startswith("-")), *(v for v in variables if v.startswith("VLLM_"))]
    return passed(f"{known.source} takes the {len(given)} that are set" if given else "none are set")


def _refusals(
    arguments: Sequence[str],
    variables: Sequence[str],
    declared: Declared,
    exists: Callable[[str], bool] | None,
    content: bytes | None,
) -> Sequence[Refusal]:
    """Return what is wrong with the arguments, then with the file of options that they name, if it was read."""
    shipped = vllm_releases.shipped()
    if content is None:
        return refusals(arguments, variables, declared, shipped, exists)
    path, declared = vllm_config_file.named_in(arguments), vllm_config_file.closed(declared)
    own = refusals(arguments, variables, declared, shipped, exists)
    try:
        words = vllm_config_file.words_of(path, content)
    except vllm_config_file.Unusable as error:
        return [*own, error.refusal]
    # An option of the one may allow more values of the other's.
    both = refusals((*words, *arguments), variables, declared, shipped, exists)
    return [*own, *(Refusal(f"{path}: {each.message}", each.hint) for each in both if each not in own)]


def _content(on: Reader, path: str) -> bytes | None:
    """Return a file of options, None if there is none, or this user may not read it."""
    try:
        return on.read(path) if path.startswith("/") else None
    except OSError:
        return None


def _exists(on: Reader, path: str) -> bool:
    try:
        return on.entry(path) is not None
    except PermissionError:
        return True


def _told(wrong: Sequence[Refusal]) -> str:
    more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    return "; ".join(f"{each.message} ({each.hint})" for each in wrong[:_SHOWN]) + more


def _where(variables: Sequence[str]) -> str:
    edit = ", or the variables in `serving.env` and `sudo systemctl edit vllm`" if variables else ""
    return f"change `serving.arguments`{edit}"
