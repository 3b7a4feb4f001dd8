"""Ray's ports, all of them fixed: a firewall cannot open ports that change at each start.

By default Ray (2.60) takes any free port for these, on every interface. They are below the range from which Linux
takes the ports of outgoing connections (32768 and above).
"""

NODE_MANAGER = 20000
OBJECT_MANAGER = 20001
DASHBOARD_AGENT_HTTP = 20002
DASHBOARD_AGENT_GRPC = 20003
RUNTIME_ENV_AGENT = 20004
METRICS = 20005
# Only on the head, if prometheus-client is installed, as it is with vLLM. `ray start` has no option for them.
AUTOSCALER_METRICS = 20006
DASHBOARD_METRICS = 20007
# Each worker process and each client (such as `vllm serve`) uses one of these.
FIRST_WORKER = 20010
LAST_WORKER = 20999

# Only on the head, on loopback.
DASHBOARD = 8265
# Only on the head, if grpcio is installed: it cannot be disabled; nothing here uses it.
CLIENT = 10001

# vLLM's processes use random rendezvous ports, unless VLLM_PORT names the first to try.
FIRST_OF_VLLM = 29600
LAST_OF_VLLM = 29699

# Port ranges that other nodes must reach on every node, besides the head's `cluster.ray_port`.
BETWEEN_NODES = (NODE_MANAGER, LAST_WORKER)
