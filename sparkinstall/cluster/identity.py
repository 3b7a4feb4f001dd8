"""Whether the hosts of a command line are the machines that the user means: names alone do not tell."""

from collections.abc import Iterator, Sequence

from sparkinstall.cluster.remote import RemoteNode
from sparkinstall.errors import Problem


def mistaken(nodes: Sequence[RemoteNode], verb: str = "") -> Iterator[tuple[int, Problem]]:
    """Yield the number of each node that is another one's machine, or that is to have the address of another one.

    Args:
        verb: that of `cluster`. One that sets nothing up may be about a part of the cluster: of the addresses only
            another order counts then.
    """
    for at, node in enumerate(nodes):
        first = next(
            (each for each in nodes[:at] if node.look.machine and each.look.machine == node.look.machine), None
        )
        if first:
            message = f"{node.host} is the same machine as {first.host}"
            yield at, Problem(message, hint="name every node once, the head first")
        elif (owner := _owner(node.member.address, node, nodes)) and (not verb or _in_another_order(nodes)):
            cause = "the nodes were set up in another order" if _in_another_order(nodes) else ""
            message = f"{node.host} is to be the {node.member.role} with {node.member.address}, but {owner.host} has it"
            yield at, Problem(message, cause=cause, hint=_way_out(owner, nodes, verb))


def _owner(address: str, node: RemoteNode, nodes: Sequence[RemoteNode]) -> RemoteNode | None:
    """Return the other node that has an address, unless `node` has it itself."""
    if address in node.look.addresses:
        return None
    return next((each for each in nodes if address in each.look.addresses), None)


def _former(nodes: Sequence[RemoteNode]) -> list[RemoteNode]:
    """Return the nodes in the order of the addresses that they have."""
    return [owner for each in nodes for owner in nodes if each.member.address in owner.look.addresses]


def _in_another_order(nodes: Sequence[RemoteNode]) -> bool:
    return sorted(each.host for each in _former(nodes)) == sorted(each.host for each in nodes)


def _way_out(owner: RemoteNode, nodes: Sequence[RemoteNode], verb: str) -> str:
    if not _in_another_order(nodes):
        return (
            f"give it another with `cluster.head` or `cluster.workers`, or free it first: "
            f"`sparkinstall cluster uninstall {owner.host}`"
        )
    order = " ".join(each.host for each in _former(nodes))
    if verb:
        return f"name them in that order: `sparkinstall cluster {verb} {order}`"
    return (
        f"to keep their roles: `sparkinstall cluster {order}`; "
        f"to change them, uninstall first: `sparkinstall cluster uninstall {order}`"
    )
