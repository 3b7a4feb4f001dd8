"""What sparkinstall decides itself: no recipe sets it, and what one says about it is listed."""

import re
from collections.abc import Iterable, Mapping

from sparkinstall.recipes import Change, Option
from sparkinstall.recipes.serve_options import key
from sparkinstall.redaction import gives_secret, is_secret_name

_EXECUTOR = "sparkinstall starts the ranks of several nodes itself"
_API = "sparkinstall decides where the API listens"
_OPTIONS = {
    "--host": _API,
    "--port": _API,
    "--uds": _API,
    "--distributed-executor-backend": _EXECUTOR,
    "--nnodes": _EXECUTOR,
    "--node-rank": _EXECUTOR,
    "--master-addr": _EXECUTOR,
    "--master-port": _EXECUTOR,
    "--headless": _EXECUTOR,
    "--data-parallel-address": _EXECUTOR,
    "--data-parallel-rpc-port": _EXECUTOR,
    "--download-dir": "models stay in the user's own cache",
    "--config": "it names a file with further options, which nobody has read",
}
_LINK = "the env file sets it, for this node's own link"
_CACHE = "caches stay where sparkinstall and the user have them"
_LIBRARIES = "it decides which programs and libraries are loaded"
_VARIABLES = (
    (r"(NCCL|GLOO|UCX|OMPI|MPI|RAY)_\w+|TP_SOCKET_IFNAME|MASTER_(ADDR|PORT)|NODE_RANK|RANK|WORLD_SIZE", _LINK),
    (r"VLLM_(HOST_IP|PORT|NCCL_SO_PATH|RAY_\w+)", _LINK),
    (r"HF_HOME|HF_(HUB|XET|DATASETS)_CACHE|HUGGINGFACE_HUB_CACHE|TRANSFORMERS_CACHE|\w+_CACHE_(ROOT|DIR|HOME)", _CACHE),
    (r"FLASHINFER_WORKSPACE_BASE|XDG_\w+|TMPDIR", _CACHE),
    (r"HF_HUB_OFFLINE|TRANSFORMERS_OFFLINE|HF_ENDPOINT", "the setting `hub.offline` decides it"),
    (r"LD_\w+|PATH|PYTHON\w+|HOME|BASH_ENV|ENV|IFS", _LIBRARIES),
)
_SECRET = "a secret does not belong in a command line or an env file"


def without_owned(args: Iterable[Option]) -> tuple[tuple[Option, ...], tuple[Change, ...]]:
    """Return the options that a recipe may set, and what was dropped."""
    kept, dropped = [], []
    for each in args:
        if why := _why_dropped(each):
            what = each[0].partition("=")[0] if why is _SECRET else " ".join(each)
            dropped.append(Change(what, "dropped", why))
        else:
            kept.append(each)
    return tuple(kept), tuple(dropped)


def _why_dropped(option: Option) -> str:
    if any(map(gives_secret, option)):
        return _SECRET
    name = key(option).partition(".")[0]
    # vLLM takes any beginning of an option that is no other's; of one that could be several nothing is kept.
    return next((why for owned, why in _OPTIONS.items() if owned.startswith(name)), "")


def env_without_owned(env: Mapping[str, str]) -> tuple[dict[str, str], tuple[Change, ...]]:
    """Return the variables that a recipe may set, and what was dropped."""
    reasons = {name: _why_unset(name) for name in env}
    kept = {name: value for name, value in env.items() if not reasons[name]}
    # The value of a secret is not repeated.
    shown = {name: name if why is _SECRET else f"{name}={env[name]}" for name, why in reasons.items() if why}
    return kept, tuple(Change(what, "dropped", reasons[name]) for name, what in shown.items())


def _why_unset(name: str) -> str:
    if is_secret_name(name):
        return _SECRET
    return next((why for pattern, why in _VARIABLES if re.fullmatch(pattern, name)), "")
