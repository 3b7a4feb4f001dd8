"""The settings: frozen dataclasses, filled from layers, each value with where it came from.

The docs' reference is made from the `doc` of each field (tools/config_reference.py).
"""

import os
import re
import reprlib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from msgspec import Struct, field
from msgspec.structs import fields

from sparkinstall import safe_yaml
from sparkinstall.errors import BadConfig
from sparkinstall.redaction import redact

DEFAULT_FILES = ("/etc/sparkinstall.yaml", "~/.config/sparkinstall.yaml")

# Settings that may name a file, and the endings that tell a file from a name.
_PATHS = ("stack", "nccl.source", "nccl.cuda_home")
_FILES = (".yaml", ".yml", ".gz", ".xz", ".bz2", ".tgz", ".tar")

_PATH = re.compile(r"/[A-Za-z0-9._+@/-]*")
# A name that ends in `-` would tell apt to remove the package.
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]*[a-z0-9+]")
_FUNCTIONS = re.compile(r"[A-Za-z0-9_*| ]+")
_ARCH = re.compile(r"[0-9]{2,3}[af]?")
_INTERFACE = re.compile(r"[A-Za-z0-9._-]{1,15}")
_VERSION = re.compile(r"\d+\.\d+(\.\d+)?(-\d+)?")
_SHARE = re.compile(r"0\.[1-8][0-9]?|0\.9[0-5]?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LINK = re.compile(r"(~?)(/[^/\0]+)+")
# The environment's scripts carry the prefix in their first line, of which the kernel reads 255 bytes.
_LONGEST_PATH = 200
# libyaml's own limits are the machine's memory and stack: a file can take the process with it.
_LARGEST_FILE = 1 << 20


def safe_path(value: str) -> str | None:
    """Why a path cannot be used, or None. LD_PRELOAD, which must carry it, takes no space and no colon."""
    if "\n" in value or "\r" in value:
        return "must not contain a line break"
    if not _PATH.fullmatch(value):
        return "must be an absolute path of letters, digits and ._+@- (LD_PRELOAD can carry no other)"
    if {"", ".", ".."} & set(value.split("/")[1:]):
        return "must be a plain path below /: no `.`, `..` or `//` in it, no `/` at its end"
    return None if len(value) <= _LONGEST_PATH else f"must be no longer than {_LONGEST_PATH} characters"


def _link_path(value: str) -> str | None:
    """A link's path is looked for below the root of a rehearsal: a relative one or `..` would lead out of it."""
    plain = _LINK.fullmatch(value) and not {".", ".."} & set(value.split("/"))
    return _no_control(value) if plain else "must be an absolute path, or one that begins with ~/"


def _like(pattern: re.Pattern[str], what: str) -> Callable[[str], str | None]:
    return lambda value: None if pattern.fullmatch(value) else f"must be {what}"


class _OneOf:
    """One of a few words; which they are is asked again to say the nearest."""

    def __init__(self, *choices: str) -> None:
        self.choices = choices

    def __call__(self, value: str) -> str | None:
        return None if value in self.choices else f"must be one of {', '.join(self.choices)}"


def _port(value: int) -> str | None:
    return None if 0 < value < 65536 else "must be a port from 1 to 65535"


def _address(value: str) -> str | None:
    from ipaddress import IPv4Address

    try:
        found = IPv4Address(value)
        # Python counts these among the private ones too.
        nobodys = found.is_loopback or found.is_reserved or found.packed[0] == 0
        return None if found.is_private and not nobodys else "must be a private IPv4 address"
    except ValueError:
        return "must be an IPv4 address such as 192.168.100.10"


def _network(value: str) -> str | None:
    from ipaddress import IPv4Network

    try:
        return None if IPv4Network(value).prefixlen else "must be a network and not the whole world"
    except ValueError:
        return "must be a network such as 192.168.1.0/24"


def _prefix_length(value: int) -> str | None:
    return None if 8 <= value <= 30 else "must be a number from 8 to 30"


def _mtu(value: int) -> str | None:
    return None if 1280 <= value <= 9978 else "must be a number from 1280 to 9978 (the links take 9000)"


def _rollback_seconds(value: int) -> str | None:
    return None if 30 <= value <= 900 else "must be a number of seconds from 30 to 900"


def _not_below_zero(value: int) -> str | None:
    return None if 0 <= value <= 1 << 24 else "must be a number from 0 to 16777216"


def _not_negative(value: int) -> str | None:
    return None if 0 <= value <= 1024 else "must be a number from 0 to 1024"


def _no_control(value: str) -> str | None:
    return None if value and value.isprintable() else "must be one line of printable text"


def _argument(value: str) -> str | None:
    if value.partition("=")[0] in ("--api-key", "--hf-token"):
        return "must carry no secret: the unit and the list of processes show it to everybody"
    return _no_control(value)


def _source(value: str) -> str | None:
    if value.startswith("http://"):
        return "must be an https URL"
    if "://" in value and "@" in value.split("://", 1)[1].split("/", 1)[0]:
        return "must not carry a name and password: download it yourself and name the file"
    return _no_control(value)


class About(Struct, frozen=True):
    """What a setting is for, and why a value cannot be used (None: it can)."""

    doc: str
    valid: Callable[[Any], str | None] | None = None


class EnvironmentConfig(Struct, frozen=True):
    link: Annotated[
        str | None, About("A symbolic link to the environment, for hands that are used to it; null: none.", _link_path)
    ] = "~/vllm-env"
    python: Annotated[
        str | None,
        About("The Python to build the environment with (a path or a name); null: the stack's version.", _no_control),
    ] = None


class NcclConfig(Struct, frozen=True):
    mode: Annotated[
        str,
        About(
            "`source` builds NCCL for this GPU; `wheel` takes the one that comes with torch.", _OneOf("source", "wheel")
        ),
    ] = "source"
    source: Annotated[
        str, About("`git` (the upstream repository), a tarball (path or https URL), or a source folder.", _source)
    ] = "git"
    sha256: Annotated[
        str | None,
        About(
            "The tarball's sha256; null: recorded at first use and held to.", _like(_SHA256, "64 hexadecimal digits")
        ),
    ] = None
    version: Annotated[
        str | None,
        About(
            "The NCCL version to build, e.g. `2.28.9`; null: the stack's own.",
            _like(_VERSION, "a version such as 2.28.9"),
        ),
    ] = None
    arch: Annotated[
        str,
        About(
            "The GPU architecture to build for (121 = GB10).", _like(_ARCH, "an architecture number such as 121 or 90a")
        ),
    ] = "121"
    cuda_home: Annotated[str | None, About("The CUDA toolkit; null: looked for.", safe_path)] = None
    jobs: Annotated[int, About("How many compilers run at once; 0: one for each core.", _not_negative)] = 0
    only_functions: Annotated[
        str | None,
        About(
            "Build a part of the collectives only (NCCL's ONLY_FUNCS); for trying things out.",
            _like(_FUNCTIONS, "words such as AllReduce Sum f32 RING *"),
        ),
    ] = None


class Fp8Config(Struct, frozen=True):
    fallback: Annotated[
        str,
        About(
            "Take Triton's FP8 kernels instead of CUTLASS: `auto` decides by looking, `on` and `off` overrule.",
            _OneOf("auto", "on", "off"),
        ),
    ] = "auto"


class ClusterConfig(Struct, frozen=True):
    role: Annotated[
        str,
        About(
            "What this node is: `single`, or `head` or `worker` of several (`multi-node --role` sets it).",
            _OneOf("single", "head", "worker"),
        ),
    ] = "single"
    head: Annotated[str, About("The head's address on the QSFP link.", _address)] = "192.168.100.10"
    workers: Annotated[
        tuple[str, ...], About("The workers' addresses on the QSFP link; their order is their rank.", _address)
    ] = ("192.168.100.11",)
    address: Annotated[
        str | None,
        About("This node's address on the QSFP link; null: the head's, or that of the only worker.", _address),
    ] = None
    executor: Annotated[
        str,
        About(
            "What spreads vLLM over the nodes: `ray`, or `mp` (vLLM's own processes, without Ray).", _OneOf("ray", "mp")
        ),
    ] = "ray"
    ray_port: Annotated[int, About("Ray's port on the head.", _port)] = 6379
    master_port: Annotated[int, About("The port on the head where the processes of `mp` meet.", _port)] = 29501


class NetworkConfig(Struct, frozen=True):
    interface: Annotated[
        str | None,
        About(
            "The QSFP interface that has the cable; null: the one with a carrier.",
            _like(_INTERFACE, "an interface name"),
        ),
    ] = None
    manage: Annotated[
        bool, About("Write netplan for the QSFP port; false: it is set up already, and only looked at.")
    ] = True
    prefix_length: Annotated[int, About("How many bits of an address on the link name its subnet.", _prefix_length)] = (
        24
    )
    twin_subnet: Annotated[
        str, About("The subnet of the port's second half, of the same length: twins must not share one.", _address)
    ] = "192.168.101.0"
    mtu: Annotated[int, About("The MTU of the QSFP interfaces; the same on every node.", _mtu)] = 9000
    transport: Annotated[
        str,
        About(
            "How NCCL talks between nodes: `roce`, `socket`, or `auto` (RoCE where its devices are really there).",
            _OneOf("auto", "roce", "socket"),
        ),
    ] = "auto"
    rollback_seconds: Annotated[
        int, About("Seconds after which an unconfirmed network change is rolled back.", _rollback_seconds)
    ] = 90


class FirewallConfig(Struct, frozen=True):
    mode: Annotated[
        str,
        About(
            "Close Ray, NCCL and the API to all but the link: `on`, `off`, or `auto` (off if another firewall runs).",
            _OneOf("auto", "on", "off"),
        ),
    ] = "auto"


class ServingConfig(Struct, frozen=True):
    model: Annotated[
        str | None, About("The model that the unit `vllm` serves (a folder or a name); null: no unit.", _no_control)
    ] = None
    port: Annotated[int, About("The API's port.", _port)] = 8000
    allow: Annotated[
        str | None, About("A network that may use the API, such as 192.168.1.0/24; null: this node alone.", _network)
    ] = None
    memory: Annotated[
        str | None,
        About(
            "vLLM's --gpu-memory-utilization; null: 0.85 on one node, 0.80 on several.",
            _like(_SHARE, "a number from 0.10 to 0.95"),
        ),
    ] = None
    max_model_len: Annotated[
        int, About("vLLM's --max-model-len; 0: 32768 on one node, 16384 on several.", _not_below_zero)
    ] = 0
    arguments: Annotated[tuple[str, ...], About("Further arguments of `vllm serve`, one word each.", _argument)] = ()


class HubConfig(Struct, frozen=True):
    offline: Annotated[
        bool, About("HF_HUB_OFFLINE=1 in single-node.env: models are on the disk, nothing is fetched.")
    ] = True


class PackagesConfig(Struct, frozen=True):
    extra: Annotated[
        tuple[str, ...],
        About("Debian packages to have besides those that the steps need.", _like(_PACKAGE, "a Debian package name")),
    ] = ()


class Config(Struct, frozen=True):
    prefix: Annotated[str, About("Where everything goes; the same on every node.", safe_path)] = "/opt/sparkinstall"
    stack: Annotated[
        str, About("The set of pins: a shipped name, or the path of a YAML file of your own.", _no_control)
    ] = "0.18.1"
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    nccl: NcclConfig = field(default_factory=NcclConfig)
    fp8: Fp8Config = field(default_factory=Fp8Config)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    firewall: FirewallConfig = field(default_factory=FirewallConfig)
    serving: ServingConfig = field(default_factory=ServingConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    packages: PackagesConfig = field(default_factory=PackagesConfig)


class Setting(Struct, frozen=True):
    """One leaf of the config: its dotted name, type, default and what it is for."""

    name: str
    type: Any
    default: Any
    doc: str
    valid: Callable[[Any], str | None] | None


class Layer(Struct, frozen=True):
    """Values by dotted name, and where they come from in words."""

    source: str
    values: Mapping[str, Any]


def settings(of: type[Any] = Config, under: str = "") -> Iterator[Setting]:
    """Every leaf of the config, in the order of the file."""
    hints = get_type_hints(of, include_extras=True)
    for each in fields(of):
        name, kind = under + each.name, hints[each.name]
        if get_origin(kind) is Annotated:
            bare, about = get_args(kind)
            yield Setting(name, bare, each.default, about.doc, about.valid)
        else:
            yield from settings(kind, name + ".")


def read_layer(path: Path) -> Layer:
    """The values of a YAML file.

    Raises:
        BadConfig: it cannot be read, is no YAML, or names a key that is not known.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(_LARGEST_FILE + 1)
    except IsADirectoryError as error:
        raise BadConfig(f"the config {path} is a folder", hint="name a YAML file with --config") from error
    except (OSError, ValueError) as error:
        raise BadConfig(f"the config {path} cannot be read: {_where(error)}", hint="name a YAML file") from error
    raw = _yaml(content, f"the config {path}")
    if raw is not None and not isinstance(raw, dict):
        raise BadConfig(f"the config {path} must be `key: value` lines, not a {type(raw).__name__}")
    return Layer(str(path), anchored(dict(_flat(raw or {}, str(path))), path.absolute().parent))


def _yaml(content: bytes, what: str) -> Any:
    try:
        return safe_yaml.load(content)
    except safe_yaml.TooMuch as error:
        raise BadConfig(f"{what} is larger or deeper than any settings are", hint="is it the right file?") from error
    except safe_yaml.NotYaml as error:
        raise BadConfig(f"{what} is not YAML: {error}", hint=error.hint) from error


def _where(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f", line {mark.line + 1}" if mark else ""
    lines = str(getattr(error, "problem", None) or getattr(error, "strerror", None) or error).splitlines()
    return f"{ascii(lines[0])[1:-1] if lines else type(error).__name__}{place}"


def _flat(raw: Mapping[Any, Any], source: str, under: str = "") -> Iterator[tuple[str, Any]]:
    known = {each.name for each in settings()}
    for key, value in raw.items():
        name = f"{under}{key}"
        if name in known:
            yield name, value
        elif any(each.startswith(name + ".") for each in known):
            yield from _section(name, value, source)
        else:
            raise _unknown(name, known, source)


def _section(name: str, value: Any, source: str) -> Iterator[tuple[str, Any]]:
    if value is not None and not isinstance(value, dict):
        raise BadConfig(f"{source}: `{name}` is a section: write its settings beneath it, one a line")
    return _flat(value or {}, source, name + ".")


def _unknown(name: str, known: set[str], source: str) -> BadConfig:
    name = ascii(name)[1:-1][:80]
    tops = {each.split(".")[0] for each in known}
    near = get_close_matches(name, [*known, *tops], n=1, cutoff=0.6) or [
        each for each in sorted(known) if each.rpartition(".")[2] == name.rpartition(".")[2]
    ]
    hint = f"did you mean `{near[0]}`?" if near else "`sparkinstall settings show` lists the known ones"
    return BadConfig(f"{source}: unknown setting `{name}`", hint=hint)


def anchored(values: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """`values` with relative paths made absolute: they are read again later, from another folder."""
    return {name: _anchored(value, base) if name in _PATHS else value for name, value in values.items()}


def _anchored(value: Any, base: Path) -> Any:
    names_a_file = isinstance(value, str) and "://" not in value and ("/" in value or Path(value).suffix in _FILES)
    # os.path takes any text; Path would raise for a user or a character that cannot be.
    return os.path.abspath(os.path.join(base, os.path.expanduser(value))) if names_a_file else value


def parse_assignment(text: str) -> tuple[str, Any]:
    """`KEY=VALUE` of a command line; the value is read as YAML.

    Raises:
        BadConfig: no `=` in it, an unknown key, or a value that is no YAML or cannot be used.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise BadConfig(f"--set {_show(text)}: write it as KEY=VALUE")
    known = {each.name: each for each in settings()}
    if name not in known:
        raise _unknown(name, set(known), "--set")
    parsed = _yaml(value.encode(errors="replace"), f"--set {name}")
    # `--set nccl.arch=90` means text: what a number is to YAML may be a name to us.
    meant = value if _takes_text(known[name].type) and parsed is not None else parsed
    # Looked at here, where it is known which option it came with: `build` knows the command line as a whole.
    _checked(known[name], meant, "--set")
    return name, meant


def _takes_text(kind: Any) -> bool:
    return kind is str or (isinstance(kind, types.UnionType) and str in get_args(kind))


def build(layers: Sequence[Layer]) -> tuple[Config, dict[str, str]]:
    """The config of `layers` (later ones win) and, for each setting, where its value came from.

    Raises:
        BadConfig: a value is of the wrong type or cannot be used.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for setting in settings():
        values[setting.name], sources[setting.name] = setting.default, "default"
        for layer in reversed(layers):
            if setting.name in layer.values:
                values[setting.name] = _checked(setting, layer.values[setting.name], layer.source)
                sources[setting.name] = layer.source
                break
    return _assemble(Config, values), sources


def _checked(setting: Setting, value: Any, source: str) -> Any:
    where = f"{source}: `{setting.name}`"
    if isinstance(value, bool) and _takes_text(setting.type):
        # `fallback: off` is a truth value to YAML and a word to whoever wrote it.
        value = "on" if value else "off"
    if isinstance(value, list) and setting.type == tuple[str, ...]:
        return tuple(_checked_item(setting, each, where) for each in value)
    if not _fits(value, setting.type):
        raise BadConfig(f"{where} must be {_in_words(setting.type)}, not {_show(value)}{_quote_hint(value, setting)}")
    return value if value is None else _valid(setting, value, where)


def _checked_item(setting: Setting, value: Any, where: str) -> Any:
    if not isinstance(value, str):
        raise BadConfig(f"{where} must be a list of text, not of {_show(value)}")
    return _valid(setting, value, where)


def _valid(setting: Setting, value: Any, where: str) -> Any:
    complaint = setting.valid(value) if setting.valid else None
    if complaint:
        raise BadConfig(f"{where} {complaint}, not {redact(_show(value))}", hint=_nearest(setting, value))
    return value


def _nearest(setting: Setting, value: Any) -> str:
    if not isinstance(setting.valid, _OneOf):
        return ""
    near = get_close_matches(value[:80].lower(), setting.valid.choices, n=1, cutoff=0.6)
    return f"did you mean `{near[0]}`?" if near else ""


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, types.UnionType):
        return any(_fits(value, each) for each in get_args(kind))
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(kind, type) and isinstance(value, kind)


def _in_words(kind: Any) -> str:
    words = {str: "text", int: "a number", bool: "true or false", types.NoneType: "null"}
    if isinstance(kind, types.UnionType):
        return " or ".join(_in_words(each) for each in get_args(kind))
    return words.get(kind, "a list of text")


def _quote_hint(value: Any, setting: Setting) -> str:
    numeric = isinstance(value, int | float) and _takes_text(setting.type)
    return f' (write it in quotes: "{value}")' if numeric else ""


def _show(value: Any) -> str:
    # Not str(): a few lines of YAML aliases can stand for more text than there is memory.
    try:
        text = ascii(value[:80]) if isinstance(value, str) else reprlib.repr(value)
    except ValueError:  # Python prints no number of more than 4300 digits
        text = f"such a {type(value).__name__}"
    return text if len(text) < 80 else text[:76] + " ..."


def _assemble(of: type[Any], values: Mapping[str, Any], under: str = "") -> Any:
    hints = get_type_hints(of)
    given = {}
    for each in fields(of):
        kind, name = hints[each.name], under + each.name
        nested = isinstance(kind, type) and issubclass(kind, Struct)
        given[each.name] = _assemble(kind, values, name + ".") if nested else values[name]
    return of(**given)
