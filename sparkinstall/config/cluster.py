"""Check that the addresses and ports of a cluster are consistent."""

from ipaddress import IPv4Address, IPv4Interface

from sparkinstall import ray_ports
from sparkinstall.config import Config
from sparkinstall.errors import BadConfig

_NAMED = "set them with `cluster.head` and `cluster.workers`, or `--head` and `--worker`"


def require_sound(config: Config) -> None:
    """Check that the addresses differ, are in one subnet and include this node's, and that no port is used twice.

    Raises:
        BadConfig: a check failed.
    """
    cluster, length = config.cluster, config.network.prefix_length
    everyone = (cluster.head, *cluster.workers)
    link = IPv4Interface(f"{cluster.head}/{length}").network
    twin = IPv4Interface(f"{config.network.twin_subnet}/{length}").network
    for each in everyone:
        if everyone.count(each) > 1:
            raise BadConfig(f"two nodes have the address {each}", hint=_NAMED)
        if IPv4Address(each) not in link:
            raise BadConfig(f"{each} is not in the head's subnet {link}", hint=_NAMED)
        if IPv4Address(each) in (link.network_address, link.broadcast_address):
            raise BadConfig(f"{each} is the subnet {link} itself, not a node in it", hint=_NAMED)
    if link.overlaps(twin):
        raise BadConfig(
            f"both halves of the port would be in one subnet: {link} and {twin}; NCCL and routing do not support that",
            hint="set `network.twin_subnet` to another one",
        )
    _require_own(config)
    _require_ports_apart(config)


def _require_own(config: Config) -> None:
    cluster = config.cluster
    if cluster.role == "head" and cluster.address not in (None, cluster.head):
        raise BadConfig(
            f"this node is the head, but its address {cluster.address} is not the head's, {cluster.head}",
            hint="set the address once, with `--head`",
        )
    if cluster.role == "worker" and cluster.address is None and len(cluster.workers) > 1:
        raise BadConfig(
            f"it is unknown which of the workers {', '.join(cluster.workers)} is this node", hint="set `--address`"
        )
    if cluster.role == "worker" and cluster.address is not None and cluster.address not in cluster.workers:
        raise BadConfig(
            f"{cluster.address} is not among the workers {', '.join(cluster.workers)}",
            hint="list all of them, with `cluster.workers` or one `--worker` each",
        )


def _require_ports_apart(config: Config) -> None:
    settable = {
        "serving.port": config.serving.port,
        "cluster.ray_port": config.cluster.ray_port,
        "cluster.master_port": config.cluster.master_port,
    }
    # Check the ports of both executors: switching takes one setting.
    taken = {
        **{name: (port, port) for name, port in settable.items()},
        "Ray": ray_ports.BETWEEN_NODES,
        "Ray's dashboard": (ray_ports.DASHBOARD, ray_ports.DASHBOARD),
        "Ray's client port": (ray_ports.CLIENT, ray_ports.CLIENT),
        "vLLM's own processes": (ray_ports.FIRST_OF_VLLM, ray_ports.LAST_OF_VLLM),
    }
    for name, port in settable.items():
        for other, (first, last) in taken.items():
            if other != name and first <= port <= last:
                raise BadConfig(
                    f"`{name}` is {port}, which is the port of {other}", hint=f"set `{name}` to another one"
                )
