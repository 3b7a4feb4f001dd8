"""vLLM as a service, with one launch command per role."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from sparkinstall import payloads
from sparkinstall.layout import API_KEY, VLLM_UNIT, unit_path
from sparkinstall.node import Node, site_packages
from sparkinstall.probes import Probe, serving, vllm_arguments
from sparkinstall.resources import Resource, systemd
from sparkinstall.resources.files import File, OwnFolder
from sparkinstall.resources.secret_files import ApiKey, NamedSecret
from sparkinstall.resources.systemd import Cause, Service, UnitFile
from sparkinstall.services import VLLM
from sparkinstall.steps import Step
from sparkinstall.steps import ray as ray_step
from sparkinstall.steps.fp8 import cutlass_patch
from sparkinstall.system import Reader

_UNIT = unit_path(VLLM_UNIT)
# Seconds to wait until the other nodes have joined Ray; vLLM itself waits as long.
_JOINED = 1800
_MIDDLEWARE = "sparkinstall_api_key.RequireKey"
_OF_SECRETS = (
    Cause(
        r"^sparkinstall: .*(API's key|VLLM_API_KEY)",
        "the API's key cannot be used",
        "correct the key in its file, or remove a generated one, or correct what is named here; then run again",
    ),
    Cause(
        r"Failed to set up credentials",
        "systemd cannot read the file of a key or token",
        "see `systemctl cat vllm`: the files after `LoadCredential=` must exist on this node; then run again",
    ),
)


class Serving(Step):
    name = "serving"
    why = "vLLM as a service"
    needs = ("env-files", "ray", "model")
    phase = "services"
    impact = "The model is not served as configured."

    def wanted(self, node: Node) -> bool:
        return node.config.serving.model is not None

    def resources(self, node: Node) -> Iterable[Resource]:
        if not VLLM.wanted(node):
            return
        depends = [_UNIT, node.env_file, node.venv_stamp, node.nccl_stamp]
        if node.several:
            yield ray_step.before_start(node)
            depends.append(node.before_start)
        if node.with_ray:
            depends += [node.vllm_kept_back, node.ray_nodes]
        if _with_head(node):
            yield File(node.with_head, payloads.as_file("with_head"))
            depends.append(node.with_head)
        if node.api_key:
            yield _key(node.api_key)
            # Python writes its compiled modules beside them.
            yield OwnFolder(node.python_modules)
            yield File(node.api_key_module, payloads.as_file("api_key"))
            depends.append(node.api_key_module)
        if node.hub_token:
            yield NamedSecret(node.hub_token, "hub.token_file")
        yield UnitFile(_UNIT, "vllm.service.j2", partial(_values, node), noted_in=node.units_record)
        inputs, noted = partial(_inputs, node, tuple(depends)), node.started_record(VLLM_UNIT)
        secrets = tuple(each for each in (node.api_key, node.hub_token) if each)
        yield Service(VLLM_UNIT, inputs, noted, (ray_step.NO_ADDRESS, *_OF_SECRETS), secrets)

    def probes(self, node: Node) -> Iterable[Probe]:
        return (vllm_arguments.probe(node, arguments(node)), *serving.probes(node))


def _key(path: str) -> Resource:
    return ApiKey(path) if path == API_KEY else NamedSecret(path, "serving.key_file")


def _with_head(node: Node) -> bool:
    """Return whether the worker's vLLM must be ended with the head's: without Ray it does not notice."""
    return node.role == "worker" and not node.with_ray


def _inputs(node: Node, depends: tuple[str, ...], on: Reader) -> Iterable[str]:
    site = site_packages(node, on)
    return (*depends, f"{site}/{cutlass_patch().target}") if site else depends


def _values(node: Node, on: Reader) -> Mapping[str, Any]:
    return {
        "user": systemd.setting(node.user),
        "env_file": systemd.setting(on.real(node.env_file)),
        "hub_offline": node.config.hub.offline,
        "hub_token": node.hub_token,
        "api_key": node.api_key,
        "python_modules": systemd.setting(on.real(node.python_modules)),
        "check_key": _check_of_key(node, on),
        "variables": [systemd.program(each) for each in node.config.serving.env],
        "several": node.several,
        "with_ray": node.with_ray,
        "before_start": systemd.program(on.real(node.before_start)),
        "command": _command(node, on),
    }


def _check_of_key(node: Node, on: Reader) -> str:
    """Return the quoted words of the check that the key will be asked for; servers of vLLM for gRPC would not."""
    others = [each for each in node.config.serving.arguments if each.startswith("--gr")]
    first, *rest = on.real(node.python), on.real(node.api_key_module), *others
    return " ".join([systemd.program(first), *map(systemd.word, rest)])


def _command(node: Node, on: Reader) -> list[str]:
    """Return the quoted words of `ExecStart=`."""
    vllm = [on.real(f"{node.venv}/bin/vllm"), "serve", str(node.config.serving.model)]
    python, cluster = on.real(node.python), node.config.cluster
    if node.with_ray:
        # Not ExecStartPre: `systemctl start` would block until the workers have joined.
        asks = on.real(node.ray_nodes)
        vllm = [python, asks, node.ray_address, str(_JOINED), "--count", str(len(node.members)), "--", *vllm]
    if _with_head(node):
        vllm = [python, on.real(node.with_head), cluster.head, str(cluster.master_port), *vllm]
    first, *rest = [*vllm, *arguments(node)]
    return [systemd.program(first), *map(systemd.word, rest)]


def arguments(node: Node) -> list[str]:
    """Return the arguments of `vllm serve MODEL` on this node; `serving.arguments` come last, so they win.

    `--trust-remote-code`, common in published launch commands, runs code from the model and must be set in
    `serving.arguments`. So must the parsers, which depend on the model.
    """
    serving = node.config.serving
    revision = ["--revision", serving.revision] if serving.revision else []
    return [*_api(node), *_share(node), *revision, *_limits(node), *_autotune(node), *serving.arguments]


def _api(node: Node) -> list[str]:
    if node.role == "worker":
        return ["--headless"]
    host = "0.0.0.0" if node.config.serving.allow else "127.0.0.1"
    words = ["--host", host, "--port", str(node.config.serving.port)]
    # vLLM's own key leaves /invocations and others open.
    return [*words, "--middleware", _MIDDLEWARE] if node.api_key else words


def _share(node: Node) -> list[str]:
    """Return the options that distribute the model over the nodes, one GPU each."""
    cluster, nodes = node.config.cluster, str(len(node.members))
    if not node.several:
        return []
    words = ["--tensor-parallel-size", nodes, "--distributed-executor-backend", cluster.executor]
    if cluster.executor == "mp":
        words += ["--nnodes", nodes, "--node-rank", str(node.rank)]
        words += ["--master-addr", cluster.head, "--master-port", str(cluster.master_port)]
    return words


def _limits(node: Node) -> list[str]:
    settings = node.config.serving
    memory = settings.memory or ("0.80" if node.several else "0.85")
    length = settings.max_model_len or (16384 if node.several else 32768)
    words = ["--gpu-memory-utilization", memory, "--max-model-len", str(length)]
    # A recipe was tried with vLLM's own defaults for what it does not name.
    return words if settings.recipe else [*words, "--enforce-eager", "--enable-prefix-caching"]


def _autotune(node: Node) -> list[str]:
    """Return the option that keeps FlashInfer from tuning its kernels on several nodes, unless the user decides it.

    Ranks that tune in step have hung at the second start, and for half an hour (vllm #57423, #52291).
    """
    # `--kernel-config` can have it too, in JSON or after a dot; vLLM takes `_` for `-`, and refuses both at once.
    named = any("flashinfer-autotune" in word.replace("_", "-") for word in node.config.serving.arguments)
    return ["--no-enable-flashinfer-autotune"] if node.several and not named else []
