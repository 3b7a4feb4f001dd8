"""Every path that sparkinstall uses on a node, and the names of its units."""

from msgspec import Struct

from sparkinstall.config import Config
from sparkinstall.stacks import Stack

UNIT_FOLDER = "/etc/systemd/system"
VLLM_UNIT = "vllm.service"
RAY_UNITS = ("ray-head.service", "ray-worker.service")
FIREWALL_UNIT = "sparkinstall-firewall.service"


def unit_path(unit: str) -> str:
    """Return the path of one of our unit files."""
    return f"{UNIT_FOLDER}/{unit}"


class Layout(Struct, frozen=True):
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

    @property
    def venv(self) -> str:
        return f"{self.prefix}/venv"

    @property
    def python(self) -> str:
        return f"{self.venv}/bin/python"

    @property
    def venv_stamp(self) -> str:
        """Describes the installed environment; written last when it is created."""
        return f"{self.venv}/sparkinstall.json"

    @property
    def venv_lock(self) -> str:
        """The complete lock that the environment was made from."""
        return f"{self.venv}/sparkinstall.lock"

    @property
    def installed_lock(self) -> str:
        """The installed part of the lock: in a rehearsal only vLLM."""
        return f"{self.venv}/installed.lock"

    @property
    def wheel_exceptions(self) -> str:
        """Rows in RECORD format for files that a wheel's RECORD lists wrongly."""
        return f"{self.venv}/not-as-recorded.csv"

    @property
    def lock_record(self) -> str:
        """Hashes recorded at the first install."""
        return f"{self.prefix}/locks/{self.stack.name}.{self.platform}.lock"

    # --- NCCL

    @property
    def nccl_folder(self) -> str:
        return f"{self.prefix}/nccl"

    @property
    def nccl_stamp(self) -> str:
        """What the library was built from."""
        return f"{self.nccl_folder}/build.json"

    # --- decisions

    @property
    def nccl_abi_decision(self) -> str:
        """Whether the library has every symbol that torch needs."""
        return f"{self.prefix}/nccl-fits-torch.json"

    @property
    def fp8_decision(self) -> str:
        """Whether vLLM avoids its CUTLASS FP8 kernels."""
        return f"{self.prefix}/fp8.json"

    @property
    def transport_decision(self) -> str:
        """Whether NCCL uses RoCE or sockets."""
        return f"{self.prefix}/transport.json"

    # --- env files

    @property
    def env_folder(self) -> str:
        return f"{self.prefix}/env"

    @property
    def env_file(self) -> str:
        """The environment variables of this node's services."""
        names = {"single": "single-node", "head": "multi-node-head", "worker": "multi-node-worker"}
        return f"{self.env_folder}/{names[self.role]}.env"

    @property
    def roce_gid(self) -> str:
        """The program that prints the current GID index of the RDMA devices."""
        return f"{self.env_folder}/roce-gid"

    # --- services

    @property
    def services(self) -> str:
        """The folder of the services' helper programs."""
        return f"{self.prefix}/services"

    @property
    def before_start(self) -> str:
        """The script that waits for the node's address before a service starts."""
        return f"{self.services}/before-start"

    @property
    def ray_nodes(self) -> str:
        """The program that asks the running Ray for its nodes."""
        return f"{self.services}/ray-nodes.py"

    @property
    def with_head(self) -> str:
        """The program that ends a worker's vLLM with the head's."""
        return f"{self.services}/with-head.py"

    @property
    def vllm_config(self) -> str:
        """vLLM's configuration folder on the head."""
        return f"{self.services}/vllm"

    @property
    def vllm_kept_back(self) -> str:
        """The list of variables that vLLM on the head does not copy to its workers."""
        return f"{self.vllm_config}/ray_non_carry_over_env_vars.json"

    @property
    def units_record(self) -> str:
        """The render record of the unit files."""
        return f"{self.services}/units.json"

    def started_record(self, unit: str) -> str:
        """The inputs of a service at its last start."""
        return f"{self.services}/{unit}.json"

    @property
    def ray_unit(self) -> str:
        """The name of Ray's unit on this node."""
        return f"ray-{self.role}.service"

    @property
    def ray_token(self) -> str:
        """The secret that all nodes of a cluster share; readable only by its owner."""
        return f"{self.prefix}/ray-token"

    # --- firewall

    @property
    def firewall_rules(self) -> str:
        """The rules that nft loads."""
        return f"{self.prefix}/firewall.nft"

    @property
    def firewall_unit_record(self) -> str:
        """The render record of the firewall's unit."""
        return f"{self.prefix}/firewall-unit.json"

    @property
    def firewall_started_record(self) -> str:
        """The inputs of the firewall's unit at its last start."""
        return f"{self.prefix}/firewall.json"
