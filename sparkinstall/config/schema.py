"""The settings: type, default and description of each. docs/config.md is generated from them."""

from collections.abc import Callable, Iterator
from functools import lru_cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from msgspec import Meta, Struct, field
from msgspec.structs import fields

from sparkinstall.config import checks
from sparkinstall.schema import like

Line = Annotated[str, checks.one_line]
SafePath = Annotated[str, checks.safe_path]
LinkPath = Annotated[str, checks.link_path]
Address = Annotated[str, checks.private_address]
Network = Annotated[str, checks.network]
Argument = Annotated[str, checks.argument]
Variable = Annotated[str, checks.variable]
Revision = Annotated[str, like(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}", "a branch, a tag or a commit")]
Source = Annotated[str, checks.source]
Port = Annotated[int, Meta(ge=1, le=65535, title="a port from 1 to 65535")]
Sha256 = Annotated[str, like("[0-9a-f]{64}", "64 hexadecimal digits")]
NcclVersion = Annotated[str, like(r"\d+\.\d+(\.\d+)?(-\d+)?", "a version such as 2.28.9")]
Arch = Annotated[str, like("[0-9]{2,3}[af]?", "an architecture number such as 121 or 90a")]
Functions = Annotated[str, like("[A-Za-z0-9_*| ]+", "words such as AllReduce Sum f32 RING *")]
Interface = Annotated[str, like("[A-Za-z0-9._-]{1,15}", "an interface name")]
Share = Annotated[str, like(r"0\.[1-8][0-9]?|0\.9[0-5]?", "a number from 0.10 to 0.95")]
# Below 1400 MHz the rule `gpu-low-power` could take a locked GPU for one that is stuck.
Clock = Annotated[int, Meta(ge=1400, le=3000, title="a number of MHz from 1400 to 3000")]
# apt would remove a package whose name ends in `-`.
Package = Annotated[str, like("[a-z0-9][a-z0-9+.-]*[a-z0-9+]", "a Debian package name")]


def doc(text: str) -> Meta:
    """Return the description of a setting."""
    return Meta(description=text)


class EnvironmentConfig(Struct, frozen=True, forbid_unknown_fields=True):
    keep_old: Annotated[bool, doc("Keep the former environment after a switch to another stack.")] = False
    link: Annotated[LinkPath | None, doc("A symbolic link to the environment, for convenience; null: none.")] = (
        "~/vllm-env"
    )
    python: Annotated[
        Line | None, doc("The Python to build the environment with (a path or a name); null: the stack's version.")
    ] = None


class NcclConfig(Struct, frozen=True, forbid_unknown_fields=True):
    mode: Annotated[
        Literal["source", "wheel"],
        doc(
            "`source` builds NCCL for this GPU; `wheel` uses the one that comes with torch (on several nodes 2.29.3 or "
            "newer)."
        ),
    ] = "source"
    source: Annotated[
        Source, doc("`git` (the upstream repository), a tarball (path or https URL), or a source folder.")
    ] = "git"
    sha256: Annotated[Sha256 | None, doc("The tarball's sha256; null: recorded at first use and enforced since.")] = (
        None
    )
    version: Annotated[NcclVersion | None, doc("The NCCL version to build, e.g. `2.28.9`; null: the stack's.")] = None
    arch: Annotated[Arch, doc("The GPU architecture to build for (121 = GB10).")] = "121"
    cuda_home: Annotated[SafePath | None, doc("The CUDA toolkit; null: detected.")] = None
    jobs: Annotated[
        int, Meta(ge=0, le=1024, title="a number from 0 to 1024"), doc("Number of parallel compilers; 0: one per core.")
    ] = 0
    only_functions: Annotated[
        Functions | None, doc("Build only some of the collectives (NCCL's ONLY_FUNCS); for experiments.")
    ] = None


class Fp8Config(Struct, frozen=True, forbid_unknown_fields=True):
    fallback: Annotated[
        Literal["auto", "on", "off"],
        doc("Use Triton's FP8 kernels instead of CUTLASS: `auto` measures, `on` and `off` override it."),
    ] = "auto"


class ClusterConfig(Struct, frozen=True, forbid_unknown_fields=True):
    role: Annotated[
        Literal["single", "head", "worker"],
        doc("The role of this node: `single`, or `head` or `worker` of several (`multi-node --role` sets it)."),
    ] = "single"
    head: Annotated[Address, doc("The head's address on the QSFP link.")] = "192.168.100.10"
    workers: Annotated[
        tuple[Address, ...], doc("The workers' addresses on the QSFP link; their order is their rank.")
    ] = ("192.168.100.11",)
    address: Annotated[
        Address | None, doc("This node's address on the QSFP link; null: the head's, or that of the only worker.")
    ] = None
    executor: Annotated[
        Literal["ray", "mp"],
        doc(
            "What distributes vLLM over the nodes: `ray`, or `mp` (vLLM's own processes, without Ray). `--serve` "
            "chooses `mp` where Ray is not set up yet."
        ),
    ] = "ray"
    ray_port: Annotated[Port, doc("Ray's port on the head.")] = 6379
    master_port: Annotated[Port, doc("The rendezvous port of the processes of `mp` on the head.")] = 29501


class NetworkConfig(Struct, frozen=True, forbid_unknown_fields=True):
    interface: Annotated[
        Interface | None, doc("The QSFP interface that has the cable; null: the one with a carrier.")
    ] = None
    manage: Annotated[
        bool, doc("Configure the QSFP port with netplan; false: it is already set up, and only checked.")
    ] = True
    prefix_length: Annotated[
        int, Meta(ge=8, le=30, title="a number from 8 to 30"), doc("Prefix length of the subnets on the link.")
    ] = 24
    twin_subnet: Annotated[
        Address, doc("The subnet of the port's second half, of the same length: halves must not share a subnet.")
    ] = "192.168.101.0"
    mtu: Annotated[
        int,
        Meta(ge=1280, le=9978, title="a number from 1280 to 9978 (the links take 9000)"),
        doc("The MTU of the QSFP interfaces; the same on every node."),
    ] = 9000
    transport: Annotated[
        Literal["auto", "roce", "socket"],
        doc("NCCL's transport between nodes: `roce`, `socket`, or `auto` (RoCE if its devices exist)."),
    ] = "auto"
    rollback_seconds: Annotated[
        int,
        Meta(ge=30, le=900, title="a number of seconds from 30 to 900"),
        doc("Seconds after which an unconfirmed network change is rolled back."),
    ] = 90


class FirewallConfig(Struct, frozen=True, forbid_unknown_fields=True):
    mode: Annotated[
        Literal["auto", "on", "off"],
        doc("Restrict Ray, NCCL and the API to the link: `on`, `off`, or `auto` (off if another firewall runs)."),
    ] = "auto"


class LifeConfig(Struct, frozen=True, forbid_unknown_fields=True):
    enabled: Annotated[
        bool, doc("Watch whether vLLM generates (the service `vllm-life`), and restart it if it does not.")
    ] = True
    every_seconds: Annotated[
        int,
        Meta(ge=1, le=300, title="a number of seconds from 1 to 300"),
        doc("Seconds between two looks at /metrics."),
    ] = 10
    still_seconds: Annotated[
        int,
        Meta(ge=5, le=7200, title="a number of seconds from 5 to 7200"),
        doc("Seconds that a busy vLLM may show no sign of life before a probe request decides whether it is wedged."),
    ] = 300
    probe_every_seconds: Annotated[
        int,
        Meta(ge=5, le=86400, title="a number of seconds from 5 to 86400"),
        doc("Seconds without a token after which an idle vLLM is asked for one."),
    ] = 300
    probe_seconds: Annotated[
        int,
        Meta(ge=2, le=1800, title="a number of seconds from 2 to 1800"),
        doc("The time limit of a probe request, which asks for one token."),
    ] = 120
    start_seconds: Annotated[
        int,
        Meta(ge=30, le=86400, title="a number of seconds from 30 to 86400"),
        doc("Seconds from the start of vLLM to its first token, after which it is restarted."),
    ] = 5400
    restarts_per_hour: Annotated[
        int,
        Meta(ge=0, le=20, title="a number from 0 to 20"),
        doc("How often it may restart vLLM within an hour; 0: it only saves evidence and tells."),
    ] = 3


class ServingConfig(Struct, frozen=True, forbid_unknown_fields=True):
    model: Annotated[
        Argument | None, doc("The model that the unit `vllm` serves (a folder or a name); null: no unit.")
    ] = None
    revision: Annotated[
        Revision | None, doc("vLLM's --revision: the commit of a model of the hub; null: the branch `main`.")
    ] = None
    recipe: Annotated[
        Line | None,
        doc(
            "The recipe that the model is served with, as `serve` sets it; then vLLM's own defaults hold for the rest."
        ),
    ] = None
    port: Annotated[Port, doc("The API's port.")] = 8000
    allow: Annotated[
        Network | None, doc("A network that may use the API, such as 192.168.1.0/24; null: only this node.")
    ] = None
    key_file: Annotated[
        SafePath | None,
        doc("The file with the API's key; null: none for this node alone, a generated one if a network may use it."),
    ] = None
    memory: Annotated[
        Share | None, doc("vLLM's --gpu-memory-utilization; null: 0.85 on one node, 0.80 on several.")
    ] = None
    max_model_len: Annotated[
        int,
        Meta(ge=0, le=1 << 24, title="a number from 0 to 16777216"),
        doc("vLLM's --max-model-len; 0: 32768 on one node, 16384 on several."),
    ] = 0
    arguments: Annotated[tuple[Argument, ...], doc("Further arguments of `vllm serve`, one word each.")] = ()
    env: Annotated[
        tuple[Variable, ...], doc("Variables of the unit `vllm`, each as NAME=VALUE; those of the env file win.")
    ] = ()
    life: LifeConfig = field(default_factory=LifeConfig)

    @property
    def is_open(self) -> bool:
        """Whether other machines may reach the API: by `allow`, or by an address in `arguments`."""
        return self.allow is not None or checks.listens_elsewhere(self.arguments)


class HubConfig(Struct, frozen=True, forbid_unknown_fields=True):
    offline: Annotated[
        bool, doc("HF_HUB_OFFLINE=1 in single-node.env: models are on the disk, nothing is downloaded.")
    ] = True
    token_file: Annotated[
        SafePath | None,
        doc("The file with the hub's token, for units that download (`hub.offline: false`); null: the user's login."),
    ] = None


class GpuConfig(Struct, frozen=True, forbid_unknown_fields=True):
    max_clock: Annotated[
        Clock | None,
        doc("The highest clock of the GPU in MHz, locked at boot (2200 for a Spark that powers off); null: no lock."),
    ] = None


class HealthConfig(Struct, frozen=True, forbid_unknown_fields=True):
    timer: Annotated[
        bool, doc("Run `health` regularly, and write the result for node_exporter: `health --install` sets it.")
    ] = False
    every_minutes: Annotated[
        int, Meta(ge=1, le=1440, title="a number of minutes from 1 to 1440"), doc("Minutes between two runs.")
    ] = 5
    folder: Annotated[
        SafePath, doc("The folder of node_exporter's textfile collector; the default is that of Debian's package.")
    ] = "/var/lib/prometheus/node-exporter"


class MonitoringConfig(Struct, frozen=True, forbid_unknown_fields=True):
    prometheus: Annotated[
        bool,
        doc(
            "Run Debian's Prometheus and node_exporter; on a worker node_exporter alone: `monitoring install` sets it."
        ),
    ] = False
    port: Annotated[Port, doc("The port of Prometheus on 127.0.0.1.")] = 9090
    days: Annotated[
        int,
        Meta(ge=1, le=3650, title="a number of days from 1 to 3650"),
        doc("Days for which Prometheus keeps what it has scraped, but at most 4 GB."),
    ] = 15
    ttft_ms: Annotated[
        int,
        Meta(ge=0, le=3600000, title="a number from 0 to 3600000"),
        doc("Milliseconds of TTFT that the 95th percentile may have without an alert; 0: no such alert."),
    ] = 500
    itl_ms: Annotated[
        int,
        Meta(ge=0, le=3600000, title="a number from 0 to 3600000"),
        doc("The same of the time between two tokens."),
    ] = 250


class PackagesConfig(Struct, frozen=True, forbid_unknown_fields=True):
    extra: Annotated[tuple[Package, ...], doc("Additional Debian packages.")] = ()


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    prefix: Annotated[SafePath, doc("The folder of the installation; the same on every node.")] = "/opt/sparkinstall"
    stack: Annotated[Line, doc("The set of pins: a shipped name, or the path of a YAML file of your own.")] = "0.29.0"
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    nccl: NcclConfig = field(default_factory=NcclConfig)
    fp8: Fp8Config = field(default_factory=Fp8Config)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    firewall: FirewallConfig = field(default_factory=FirewallConfig)
    serving: ServingConfig = field(default_factory=ServingConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    gpu: GpuConfig = field(default_factory=GpuConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    monitoring: MonitoringConfig = field(default_factory=MonitoringConfig)
    packages: PackagesConfig = field(default_factory=PackagesConfig)


class Setting(Struct, frozen=True):
    """One leaf of the config: its dotted name, type, default and description.

    `check` returns what is wrong with a value that its type allows (an item of a list), or None.
    """

    name: str
    type: Any
    default: Any
    doc: str
    check: Callable[[Any], str | None] | None

    @property
    def takes_text(self) -> bool:
        """Whether a text can be its value."""
        bare = get_args(self.type)[0]
        members = get_args(bare) if get_origin(bare) in (Union, UnionType) else (bare,)
        kinds = [each.__origin__ if get_origin(each) is Annotated else each for each in members]
        return any(kind is str or get_origin(kind) is Literal for kind in kinds)


@lru_cache(maxsize=1)
def settings() -> tuple[Setting, ...]:
    """Return every leaf of the config, in the order of the file."""
    return tuple(_settings(Config, ""))


def _settings(of: type[Any], under: str) -> Iterator[Setting]:
    hints = get_type_hints(of, include_extras=True)
    for each in fields(of):
        name, kind = under + each.name, hints[each.name]
        if get_origin(kind) is Annotated:
            text = next(extra.description for extra in kind.__metadata__ if getattr(extra, "description", None))
            check = next((each for each in _extras(kind) if callable(each)), None)
            yield Setting(name, kind, each.default, text, check)
        else:
            yield from _settings(kind, name + ".")


def _extras(kind: Any) -> Iterator[Any]:
    """Yield the metadata of a type and of the types within it."""
    yield from getattr(kind, "__metadata__", ())
    for each in get_args(kind)[:1] if get_origin(kind) is Annotated else get_args(kind):
        yield from _extras(each)
