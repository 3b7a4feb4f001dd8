"""Whether the vLLM of a node takes the arguments and variables that it is started with, before it is started."""

from collections.abc import Sequence
from functools import partial

from sparkinstall.facts import units, vllm_releases
from sparkinstall.facts.vllm_options import Refusal, refusals
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
    exists = partial(_exists, on) if VLLM.wanted(node) and not on.rehearsal else None
    wrong = refusals(arguments, variables, known.declared, vllm_releases.shipped(), exists)
    if wrong:
        return failed(_told(wrong), _where(variables), f"what {known.source} declares")
    given = [*(word for word in arguments if word.startswith("-")), *(v for v in variables if v.startswith("VLLM_"))]
    return passed(f"{known.source} takes the {len(given)} that are set" if given else "none are set")


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
