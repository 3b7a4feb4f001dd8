"""Every path that sparkinstall uses on a node, and the names of its units."""

from __future__ import annotations

from msgspec import Struct

from sparkinstall.config import Config
from sparkinstall.stacks import Stack

UNIT_FOLDER = "/etc/systemd/system"
VLLM_UNIT = "vllm.service"
RAY_UNITS = ("ray-head.service", "ray-worker.service")
FIREWALL_UNIT = "sparkinstall-firewall.service"
CLOCK_LOCK_UNIT = "sparkinstall-clock-lock.service"
LIFE_UNIT = "vllm-life.service"
PROMETHEUS_UNIT, EXPORTER_UNIT = "prometheus.service", "prometheus-node-exporter.service"
"""Those of Debian's packages; a file in the drop-in folder of each makes it ours."""
PROMETHEUS_CONFIG = "/etc/prometheus/sparkinstall.yml"
PROMETHEUS_RULES = "/etc/prometheus/sparkinstall.rules.yml"
HEALTH_UNIT = "sparkinstall-health.service"
HEALTH_TIMER = "sparkinstall-health.timer"
HEALTH_METRICS = "sparkinstall_health.prom"
"""The file in node_exporter's folder that the timer writes: the exporter reads those that end so."""
LIFE_PROGRAM = "/usr/local/lib/vllm-life.py"
"""Not below the prefix, which belongs to the user who runs vLLM: root runs this program."""
LIFE_FOLDER = "/var/lib/vllm-life"
"""The evidence, and what the proof of life knows after a boot. The same with every prefix."""
LIFE_LIVE = "/run/vllm-life"
"""The folder in memory in which it notes every look."""
API_KEY = "/etc/sparkinstall-api-key"
"""The generated key of the API. Not below the prefix, which belongs to a user: only root reads it."""


def unit_path(unit: str) -> str:
    return f"{UNIT_FOLDER}/{unit}"


def drop_in_path(unit: str) -> str:
    """Our file that changes a unit of others."""
    return f"{unit_path(unit)}.d/sparkinstall.conf"


class _Below:
    """An attribute of `Layout`: this path below the prefix."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __get__(self, layout: Layout, _: type[Layout]) -> str:
        return f"{layout.prefix}/{self._path}"


class _InVenv(_Below):
    """An attribute of `Layout`: this path in the environment."""

    def __get__(self, layout: Layout, _: type[Layout]) -> str:
        return f"{layout.venv}/{self._path}"


class _Environment(Struct, frozen=True, kw_only=True):
    """`venv_name`: the environment below the prefix. `venv` is a link to the one in use, in the folder `venvs`."""

    venv_name: str = "venv"


class Layout(_Environment, frozen=True):
    """All paths are node paths: absolute, below `prefix`. `platform` is the architecture of the wheels."""

    config: Config
    stack: Stack
    platform: str

    @property
    def prefix(self) -> str:
        return self.config.prefix

    @property
    def role(self) -> str:
        """`single`, `head` or `worker`."""
        return self.config.cluster.role

    # --- the environment

    venvs = _Below("venvs")
    """The folder of all environments, each at its final place: scripts in it have absolute paths."""

    @property
    def venv(self) -> str:
        return f"{self.prefix}/{self.venv_name}"

    python = _InVenv("bin/python")
    venv_stamp = _InVenv("sparkinstall.json")
    """Describes the installed environment; written last when it is created."""
    venv_lock = _InVenv("sparkinstall.lock")
    """The complete lock that the environment was made from."""
    installed_lock = _InVenv("installed.lock")
    """The installed part of the lock: in a rehearsal only vLLM."""
    wheel_exceptions = _InVenv("not-as-recorded.csv")
    """Rows in RECORD format for files that a wheel's RECORD lists wrongly."""

    @property
    def lock_record(self) -> str:
        """Hashes recorded at the first install."""
        return f"{self.prefix}/locks/{self.stack.name}.{self.platform}.lock"

    # --- NCCL

    nccl_folder = _Below("nccl")
    nccl_stamp = _Below("nccl/build.json")
    """What the library was built from."""

    # --- decisions

    nccl_abi_decision = _Below("nccl-fits-torch.json")
    """Whether the library has every symbol that torch needs."""
    fp8_decision = _Below("fp8.json")
    """Whether vLLM avoids its CUTLASS FP8 kernels."""
    transport_decision = _Below("transport.json")
    """Whether NCCL uses RoCE or sockets."""

    # --- env files

    env_folder = _Below("env")
    roce_gid = _Below("env/roce-gid")
    """The program that prints the current GID index of the RDMA devices."""

    @property
    def env_file(self) -> str:
        """The environment variables of this node's services."""
        names = {"single": "single-node", "head": "multi-node-head", "worker": "multi-node-worker"}
        return f"{self.env_folder}/{names[self.role]}.env"

    # --- services

    services = _Below("services")
    """The folder of the services' helper programs."""
    before_start = _Below("services/before-start")
    """The script that waits for the node's address before a service starts."""
    ray_nodes = _Below("services/ray-nodes.py")
    """The program that asks the running Ray for its nodes."""
    with_head = _Below("services/with-head.py")
    """The program that ends a worker's vLLM with the head's."""
    python_modules = _Below("services/python")
    """The folder of the modules that vLLM imports."""
    api_key_module = _Below("services/python/sparkinstall_api_key.py")
    """The middleware that asks for the API's key."""
    vllm_config = _Below("services/vllm")
    """vLLM's configuration folder on the head."""
    vllm_kept_back = _Below("services/vllm/ray_non_carry_over_env_vars.json")
    """The list of variables that vLLM on the head does not copy to its workers."""
    units_record = _Below("services/units.json")
    """The render record of the unit files."""
    clock_lock_unit_record = _Below("services/clock-lock-unit.json")
    """The render record of the clock lock's unit, whose step runs beside those of the others."""
    life_unit_record = _Below("services/life-unit.json")
    """The render record of the unit that watches vLLM."""
    health_unit_record = _Below("services/health-unit.json")
    """The render record of the units that judge the node regularly."""
    monitoring_unit_record = _Below("services/monitoring-unit.json")
    """The render record of the files that make Debian's units ours."""
    serving_record = _Below("services/serving.json")
    """What runs since the last start that `serve` waited for."""
    ray_token = _Below("ray-token")
    """The secret that all nodes of a cluster share; readable only by its owner."""

    def started_record(self, unit: str) -> str:
        """The inputs of a service at its last start."""
        return f"{self.services}/{unit}.json"

    @property
    def health_metrics(self) -> str:
        """The file with the result of the last `health` that the timer has run."""
        return f"{self.config.health.folder}/{HEALTH_METRICS}"

    @property
    def api_key(self) -> str | None:
        """The file with the API's key; None: this node's API asks for none, or it has no API."""
        serving = self.config.serving
        if self.role == "worker" or serving.model is None:
            return None
        return serving.key_file or (API_KEY if serving.is_open else None)

    @property
    def hub_token(self) -> str | None:
        """The file with the token for the hub; None: none is named, or nothing is downloaded while serving."""
        return None if self.config.hub.offline else self.config.hub.token_file

    @property
    def ray_unit(self) -> str:
        return f"ray-{self.role}.service"

    # --- firewall

    firewall_rules = _Below("firewall.nft")
    """The rules that nft loads."""
    firewall_unit_record = _Below("firewall-unit.json")
    """The render record of the firewall's unit."""
    firewall_started_record = _Below("firewall.json")
    """The inputs of the firewall's unit at its last start."""
