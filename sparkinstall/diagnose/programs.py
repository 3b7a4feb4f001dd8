"""Another server than vLLM: what is told of a failure of both, in that program's own name and options."""

import re
from collections.abc import Set
from typing import TypeVar

from msgspec import Struct
from msgspec.structs import replace

from sparkinstall.diagnose import advice
from sparkinstall.diagnose.signatures import KnownFailure

Told = TypeVar("Told", bound=KnownFailure)


class Program(Struct, frozen=True):
    """A server that shares libraries and models with vLLM.

    `event`: the entry that recognizes its log. `path`: where its code is. `options`: its names of vLLM's options; what
    is missing there it does not have, except `same`.
    """

    name: str
    event: str
    path: str
    options: dict[str, str]
    same: frozenset[str]
    newer: str
    link: str


SGLANG = Program(
    name="SGLang",
    event="sglang-runs",
    path="sglang/",
    options={
        "--attention-backend TRITON_ATTN` or FLASH_ATTN": "--attention-backend triton`",
        "--attention-backend TRITON_ATTN": "--attention-backend triton",
        "--moe-backend marlin` or `triton": "--moe-runner-backend triton",
        "--moe-backend marlin": "--moe-runner-backend triton",
        "--moe-backend": "--moe-runner-backend",
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
    newer="a newer release of SGLang",
    link="https://docs.sglang.io/",
)  # fmt: skip
PROGRAMS = (SGLANG,)

_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+[a-z]")
_NEWER = re.compile(r"a newer (?:stack|version \(`sparkinstall)|another stack|sparkinstall (?:plan --stack|stacks)")
_BEFORE_NEWER = re.compile(
    r",? ?(?:(?:or|and|then|try) )*(?:a newer (?:stack|version)|another stack|a stack whose)|\. A newer stack"
)
# What changes vLLM's environment, or is said of it alone.
_OF_VLLM = re.compile(
    r"\bVLLM_|~/\.cache/vllm|sparkinstall (?:run environment|all|verify --only (?:environment|wheel-gate|imports))"
    r"|sparkinstall (?:plan|stacks)|(?:packages|serving)\.\w+"
)
# What is for some releases of vLLM, and what stands in quotation marks, with what joins it to the others.
_OF_RELEASES = re.compile(
    r",? (?:or |and )?[^,;()]*\((?:vLLM \S+ and later|before vLLM \S+)\)|\{(?:from|before) [^{}]*\}"
)
_QUOTED = re.compile(r"(?:,? (?:or|and) |, )?`[^`]+`(?: \(`serving\.arguments`\))?")
_PARTS = re.compile(r"; (?![^()]*\))")
_DANGLING = re.compile(r",?(?: (?:another|against|or|and|with|without|by|than|then|of))+$")
_TWICE = re.compile(r"(`[^`]+`)(?:, | or )\1")


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
    """Return the parts of a hint that fit the program; a newer stack is a newer release of it."""
    own = {each.split()[0] for each in program.options.values()} | program.same
    foreign = advice.options_of_vllm() - own
    parts: list[str] = []
    is_newer = False
    for told in _PARTS.split(hint):
        part = _OF_RELEASES.sub("", told)
        for theirs, its in program.options.items():
            part = re.sub(rf"(?<![\w-]){re.escape(theirs)}(?![\w-])", its, part)
        if _NEWER.search(part):
            is_newer = True
            part = _BEFORE_NEWER.split(part)[0].rstrip(" ,:")
        part = _QUOTED.sub(lambda found: "" if _is_foreign(found[0], foreign) else found[0], part)
        part = _TWICE.sub(r"\1", _DANGLING.sub("", part.rstrip()).replace(" )", ")").replace("()", "")).strip()
        is_left = "`" in part or "`" not in told
        if is_left and " " in part.strip(" ,:") and not _is_foreign(part, foreign):
            parts.append(_named(part, program.name))
    return "; ".join([*parts, *([program.newer] if is_newer or not parts else [])])


def _is_foreign(text: str, options: Set[str]) -> bool:
    return _OF_VLLM.search(text) is not None or not options.isdisjoint(_FLAG.findall(text))
