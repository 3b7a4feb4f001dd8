"""Who answers to an address on the cable."""

from sparkinstall.facts import ip, network
from sparkinstall.system import Reader


def neighbour(on: Reader, interface: str, address: str) -> str:
    """The MAC address of who answers to `address` on the cable; empty where nobody does.

    A ping goes out for the sake of the question that comes before it: whose address is this?
    """
    # What the kernel remembers of the address may be long past.
    on.ask("ip", "neighbour", "flush", "to", address, "dev", interface, root=True)
    network.ping(on, "-c", "1", "-I", interface, address)
    found = ip.asked(on, "neighbour", "show", "to", address, "dev", interface)
    return next((str(each.get("lladdr")) for each in found if "REACHABLE" in each.get("state", ())), "")
