"""Every path of a node that sparkinstall fills, and the names of its units."""

from msgspec import Struct

from sparkinstall.config import Config
from sparkinstall.stacks import Stack

UNIT_FOLDER = "/etc/systemd/system"
VLLM_UNIT = "vllm.service"
RAY_UNITS = ("ray-head.service", "ray-worker.service")
FIREWALL_UNIT = "sparkinstall-firewall.service"


def unit_path(unit: str) -> str:
    """The file of a unit of ours."""
    return f"{UNIT_FOLDER}/{unit}"


class Layout(Struct, frozen=True):
    """All paths are node paths: absolute, below `prefix`. `platform` is the architecture whose wheels are taken."""

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
        """Which environment there is: written last when it is made."""
        return f"{self.venv}/sparkinstall.json"

    @property
    def venv_lock(self) -> str:
        """The whole lock that the environment was made from."""
        return f"{self.venv}/sparkinstall.lock"

    @property
    def installed_lock(self) -> str:
        """The part of the lock that was installed: in a rehearsal, vLLM alone."""
        return f"{self.venv}/installed.lock"

    @property
    def wheel_exceptions(self) -> str:
        """Rows, as RECORD has them, of files that a wheel lists wrongly."""
        return f"{self.venv}/not-as-recorded.csv"

    @property
    def lock_record(self) -> str:
        """Where hashes that could not be known beforehand are recorded."""
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
        """Whether the library has every symbol that torch takes from it."""
        return f"{self.prefix}/nccl-fits-torch.json"

    @property
    def fp8_decision(self) -> str:
        """Whether vLLM keeps off its CUTLASS FP8 kernels."""
        return f"{self.prefix}/fp8.json"

    @property
    def transport_decision(self) -> str:
        """Whether NCCL talks over RoCE or sockets, as it was decided."""
        return f"{self.prefix}/transport.json"

    # --- env files

    @property
    def env_folder(self) -> str:
        return f"{self.prefix}/env"

    @property
    def env_file(self) -> str:
        """The variables that this node's services start with."""
        names = {"single": "single-node", "head": "multi-node-head", "worker": "multi-node-worker"}
        return f"{self.env_folder}/{names[self.role]}.env"

    @property
    def roce_gid(self) -> str:
        """The program that tells which GID the RDMA devices have at the moment."""
        return f"{self.env_folder}/roce-gid"

    # --- services

    @property
    def services(self) -> str:
        """The folder of what the services are started with."""
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
        """Where vLLM looks for settings of its own on the head."""
        return f"{self.services}/vllm"

    @property
    def vllm_kept_back(self) -> str:
        """The list of variables that vLLM on the head does not hand to its workers."""
        return f"{self.vllm_config}/ray_non_carry_over_env_vars.json"

    @property
    def units_record(self) -> str:
        """What the units were made from; /etc is no place for it."""
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
        """The secret that all nodes of a cluster share; readable by its owner alone."""
        return f"{self.prefix}/ray-token"

    # --- firewall

    @property
    def firewall_rules(self) -> str:
        """The file that nft loads."""
        return f"{self.prefix}/firewall.nft"

    @property
    def firewall_unit_record(self) -> str:
        """What the firewall's unit was made from."""
        return f"{self.prefix}/firewall-unit.json"

    @property
    def firewall_started_record(self) -> str:
        """The inputs of the firewall's unit at its last start."""
        return f"{self.prefix}/firewall.json"
