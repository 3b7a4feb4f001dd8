"""Probe of the running Ray: its nodes, and the addresses with which they joined."""

from collections.abc import Iterable, Sequence

from sparkinstall import schema
from sparkinstall.facts.env_file import with_env_file
from sparkinstall.node import Node
from sparkinstall.probes import Finding, Probe, failed, passed
from sparkinstall.system import Reader

# Ray answers immediately or never.
_PATIENCE = 10
_OURS = "sparkinstall: "


def probes(node: Node) -> Iterable[Probe]:
    yield Probe(
        "ray-nodes", "all nodes in Ray, at their QSFP addresses", lambda on: _nodes(node, on), "cluster",
        "vLLM waits for GPUs that never appear, and gives up.", others=True,
        needs_node="a rehearsal starts no services",
    )  # fmt: skip


def _nodes(node: Node, on: Reader) -> Finding:
    if on.entry(node.ray_nodes) is None or on.entry(node.env_file) is None:
        return failed("Ray was not set up", "run `sparkinstall all`")
    found = _ask(node, on)
    if isinstance(found, str):
        return failed(found, f"read `journalctl -u {node.ray_unit}`; start it with `sparkinstall run ray`")
    return _compare(node, found)


def _ask(node: Node, on: Reader) -> list[str] | str:
    """Return the addresses of the nodes that are alive, or why there was no answer."""
    command = ("python", on.real(node.ray_nodes), node.ray_address, str(_PATIENCE))
    answer = with_env_file(node, on, *command, timeout=_PATIENCE + 30)
    if answer.code == 124:
        return f"Ray at {node.ray_address} did not answer in time"
    told = [line.removeprefix(_OURS) for line in answer.err.splitlines() if line.startswith(_OURS)]
    if told:
        return told[-1]
    try:
        return schema.read_json(list[str], answer.out.splitlines()[-1], "Ray")
    except (ValueError, IndexError):
        return answer.last_line or f"it ended with code {answer.code}"


def _compare(node: Node, found: Sequence[str]) -> Finding:
    """Compare: the head checks all nodes, a worker only itself."""
    wanted = node.members if node.role == "head" else (node.address,)
    missing, strange = sorted(set(wanted) - set(found)), sorted(set(found) - set(node.members))
    if missing:
        hint = f"on each of them: `sparkinstall run ray`, and read `journalctl -u ray-worker`; here: {_FIREWALL}"
        return failed(f"not in Ray: {', '.join(missing)}; there are {_listed(found)}", hint, _listed(wanted))
    if strange:
        return failed(
            f"nodes at other addresses: {', '.join(strange)}",
            "start Ray there with its unit, which uses the address on the QSFP link, and not by hand",
            _listed(node.members),
        )
    return passed(_listed(found), _listed(wanted))


_FIREWALL = "check that the firewall accepts the QSFP link"


def _listed(addresses: Iterable[str]) -> str:
    return ", ".join(addresses) or "none"
