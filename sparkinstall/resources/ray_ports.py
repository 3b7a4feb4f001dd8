"""Ray's ports, all of them fixed: a firewall cannot name what is drawn by lot at each start.

Left to itself Ray (2.60) takes any free port for these, on every interface. They lie below the range from
which Linux draws the ports of outgoing connections (32768 and above).
"""

from sparkinstall.config import Config
from sparkinstall.errors import BadConfig

NODE_MANAGER = 20000
OBJECT_MANAGER = 20001
DASHBOARD_AGENT_HTTP = 20002
DASHBOARD_AGENT_GRPC = 20003
RUNTIME_ENV_AGENT = 20004
METRICS = 20005
# Each worker process and each program that joins (`vllm serve` is one) takes one of these.
FIRST_WORKER = 20010
LAST_WORKER = 20999

# The head alone, on loopback.
DASHBOARD = 8265
# The head alone, where grpcio is installed: it cannot be switched off, and nothing here uses it.
CLIENT = 10001

# vLLM's own processes meet at ports that it draws by lot, unless VLLM_PORT names the first to try.
FIRST_OF_VLLM = 29600
LAST_OF_VLLM = 29699

# What other nodes must reach on every node, besides the head's own port (`cluster.ray_port`): first and last.
BETWEEN_NODES = (NODE_MANAGER, LAST_WORKER)


def require_apart(config: Config) -> None:
    """See that no port is asked for twice, whichever executor there is: the other one is a setting away.

    Raises:
        BadConfig: one is.
    """
    fixed = (
        ("Ray", BETWEEN_NODES),
        ("Ray's dashboard", (DASHBOARD, DASHBOARD)),
        ("Ray's client port", (CLIENT, CLIENT)),
        ("vLLM's own processes", (FIRST_OF_VLLM, LAST_OF_VLLM)),
    )
    asked = {
        "serving.port": config.serving.port,
        "cluster.ray_port": config.cluster.ray_port,
        "cluster.master_port": config.cluster.master_port,
    }
    for name, port in asked.items():
        others = [(other, (its, its)) for other, its in asked.items() if other != name]
        for other, (first, last) in (*others, *fixed):
            if first <= port <= last:
                raise BadConfig(
                    f"`{name}` is {port}, which is the port of {other}", hint=f"set `{name}` to another one"
                )
