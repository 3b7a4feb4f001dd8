"""Another server than vLLM: what is told of a failure of both, in that program's name, without what only vLLM has."""

import re
from functools import reduce
from typing import TypeVar

from msgspec import Struct
from msgspec.structs import replace

from sparkinstall.diagnose import advice
from sparkinstall.diagnose.signatures import KnownFailure

Told = TypeVar("Told", bound=KnownFailure)


class Program(Struct, frozen=True):
    """A server that shares libraries and models with vLLM.

    `event`: the entry that recognizes its log. `path`: where its code is. `options`: its names of vLLM's options, and
    of what stands for one. `same`: the options that both have. What is in neither it does not have.
    """

    name: str
    event: str
    path: str
    options: dict[str, str]
    same: frozenset[str]
    link: str


SGLANG = Program(
    name="SGLang",
    event="sglang-runs",
    path="sglang/",
    options={
        "--gpu-memory-utilization": "--mem-fraction-static",
        "serving.memory": "--mem-fraction-static",
        "serving.max_model_len": "--context-length",
        "--max-model-len": "--context-length",
        "--max-num-seqs": "--max-running-requests",
        "--max-num-batched-tokens": "--chunked-prefill-size",
        "--max-cudagraph-capture-size": "--cuda-graph-max-bs",
        "--enforce-eager": "--disable-cuda-graph",
        "--tensor-parallel-size": "--tp-size",
        "--pipeline-parallel-size": "--pp-size",
        "--data-parallel-size": "--dp-size",
        "--speculative-config": "--speculative-algorithm",
        "--no-enable-prefix-caching": "--disable-radix-cache",
        "--hf-overrides": "--json-model-override-args",
        "vllm serve --help=all": "python3 -m sglang.launch_server --help",
        "vllm serve": "python3 -m sglang.launch_server",
    },
    same=frozenset(
        {
            "--attention-backend", "--chat-template", "--disable-custom-all-reduce", "--download-dir", "--dtype",
            "--host", "--kv-cache-dtype", "--load-format", "--model-loader-extra-config", "--nnodes", "--node-rank",
            "--port", "--quantization", "--reasoning-parser", "--revision", "--served-model-name", "--tokenizer-mode",
            "--tool-call-parser", "--trust-remote-code",
        }
    ),
    link="https://docs.sglang.io/",
)  # fmt: skip
PROGRAMS = (SGLANG,)

_PARTS = re.compile(r"; (?![^()]*\))")
_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+[a-z]")
# What is in vLLM's environment, its releases, and the values that its options take.
_OF_VLLM = re.compile(
    r"\bVLLM_|\{(?:from|before) |vLLM \d|~/\.cache/vllm|\bsparkinstall \w|\b(?:packages|serving)\.\w"
    r"|\b(?:TRITON|FLASH|TORCH)_(?:ATTN|MLA|SDPA)\b|a newer stack|another stack"
)


def rewritten(told: Told, program: Program) -> Told:
    """Return what is told of a failure as it is true of another program than vLLM: with its name, and of the actions
    those that it knows."""
    links = tuple(each for each in told.links if "vllm" not in each) or (program.link,)
    name = program.name
    return replace(
        told, title=_named(told.title, name), why=_named(told.why, name), hint=_hint(told.hint, program), links=links
    )


def _named(text: str, name: str) -> str:
    return re.sub(r"(?<![\w./-])vLLM(?![\w/-])", name, text)


def _hint(hint: str, program: Program) -> str:
    """Return the parts of a hint that name nothing that only vLLM has; a newer release stands for the others."""
    parts = _PARTS.split(hint)
    known = [_named(_with_its_options(each, program), program.name) for each in parts if not _is_foreign(each, program)]
    return "; ".join(known if len(known) == len(parts) else [*known, f"a newer release of {program.name}"])


def _with_its_options(text: str, program: Program) -> str:
    return reduce(
        lambda told, names: re.sub(rf"(?<![\w-]){re.escape(names[0])}(?![\w-])", names[1], told),
        program.options.items(),
        text,
    )


def _is_foreign(part: str, program: Program) -> bool:
    own = {each.split()[0] for each in program.options.values()} | program.same
    told = _with_its_options(part, program)
    return _OF_VLLM.search(told) is not None or not (advice.options_of_vllm() - own).isdisjoint(_FLAG.findall(told))
