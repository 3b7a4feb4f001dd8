"""Another server than vLLM: what is told of a failure of both, in that program's name, without what only vLLM has."""

import re
from collections.abc import Sequence
from functools import cached_property
from typing import TypeVar

from msgspec import Struct
from msgspec.structs import replace

from sparkinstall.diagnose import advice
from sparkinstall.diagnose.projects import OF_MODELS
from sparkinstall.diagnose.signatures import KnownFailure, steps

Told = TypeVar("Told", bound=KnownFailure)
ELSEWHERE = (
    "look at what the program was given: its options, its files of settings, its input; then another release of the "
    "package that it is of, or the one from before its last update"
)
"""What to do about a program that has no part in serving a model."""


_SETTINGS = {"serving.memory": "--gpu-memory-utilization", "serving.max_model_len": "--max-model-len"}
"""Settings of sparkinstall, and the option of vLLM that each sets."""


class Program(Struct, frozen=True, dict=True):
    """A server that shares libraries and models with vLLM.

    `event`: the entry that recognizes its log. `path`: where its code is. `options`: its names of vLLM's options and of
    their values. `same`: the options that both have. What is in neither it does not have. `command`: what starts it.
    """

    name: str
    event: str
    path: str
    options: dict[str, str]
    same: frozenset[str]
    link: str
    command: str = ""

    @cached_property
    def foreign(self) -> frozenset[str]:
        """The options that only vLLM has."""
        own = {each.split()[0] for each in self.options.values()} | self.same
        those = advice.options_of_vllm()
        return those.union(f"--no-{each[2:]}" for each in those) - own

    @cached_property
    def _words(self) -> dict[str, str]:
        """Its words for vLLM's options, the settings that stand for them, and vLLM's commands."""
        settings = {name: self.options[option] for name, option in _SETTINGS.items() if option in self.options}
        commands = {"vllm serve --help=all": f"{self.command} --help", "vllm serve": self.command}
        return {**self.options, **settings, **(commands if self.command else {})}

    @cached_property
    def _names(self) -> re.Pattern[str]:
        return re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, self._words))})(?![\w-])")

    def with_its_options(self, text: str) -> str:
        """Return a text with this program's options in place of vLLM's."""
        if not self._words:
            return text
        own = self._names.sub(lambda found: self._words[found[0]], text)
        return _TWICE.sub(lambda found: f" or {found[2]}" if found[1] else found[2], own)


SGLANG = Program(
    name="SGLang",
    event="sglang-runs",
    path="sglang/",
    options={
        "--gpu-memory-utilization": "--mem-fraction-static",
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
        "--moe-backend": "--moe-runner-backend",
        "--no-async-scheduling": "--disable-overlap-schedule",
        "--no-enable-flashinfer-autotune": "--disable-flashinfer-autotune",
        # What else it has for attention is for other GPUs.
        "TRITON_ATTN": "triton",
        "TRITON_MLA": "triton",
        "FLASH_ATTN": "flashinfer",
        "FLASHINFER": "flashinfer",
    },
    command="python3 -m sglang.launch_server",
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
LLAMA_CPP = Program(
    name="llama.cpp",
    event="llama-cpp-runs",
    path="llama_cpp/",
    options={
        "--max-model-len": "--ctx-size",
        "--max-num-seqs": "--parallel",
        "--max-num-batched-tokens": "--batch-size",
    },
    command="llama-server",
    same=frozenset({"--api-key", "--chat-template", "--host", "--port"}),
    link="https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md",
)
TENSORRT_LLM = Program(
    name="TensorRT-LLM",
    event="tensorrt-llm-runs",
    path="tensorrt_llm/",
    options={
        "--gpu-memory-utilization": "--kv_cache_free_gpu_memory_fraction",
        "--max-model-len": "--max_seq_len",
        "--max-num-seqs": "--max_batch_size",
        "--max-num-batched-tokens": "--max_num_tokens",
        "--tensor-parallel-size": "--tp_size",
        "--pipeline-parallel-size": "--pp_size",
        "--trust-remote-code": "--trust_remote_code",
    },
    command="trtllm-serve",
    same=frozenset({"--host", "--port", "--tokenizer"}),
    link="https://nvidia.github.io/TensorRT-LLM/",
)
OLLAMA = Program(
    name="Ollama",
    event="ollama-runs",
    path="ollama/",
    options={"--max-model-len": "num_ctx"},
    same=frozenset(),
    link="https://github.com/ollama/ollama/blob/main/docs/troubleshooting.mdx",
)
COMFYUI = Program(
    name="ComfyUI",
    event="comfyui-runs",
    path="custom_nodes/",
    options={},
    same=frozenset({"--port"}),
    link="https://docs.comfy.org/troubleshooting/overview",
)
TRAINING = Program(
    name="the training",
    event="training-runs",
    path="transformers/trainer",
    options={},
    same=frozenset(),
    link="https://huggingface.co/docs/transformers/main_classes/trainer",
)
LMDEPLOY = Program(
    name="LMDeploy",
    event="lmdeploy-runs",
    path="lmdeploy/",
    options={
        "--gpu-memory-utilization": "--cache-max-entry-count",
        "--max-model-len": "--session-len",
        "--max-num-seqs": "--max-batch-size",
        "--max-num-batched-tokens": "--max-prefill-token-num",
        "--tensor-parallel-size": "--tp",
        "--data-parallel-size": "--dp",
        "--enforce-eager": "--eager-mode",
    },
    command="lmdeploy serve api_server",
    same=frozenset({"--chat-template", "--download-dir", "--dtype", "--reasoning-parser", "--revision"}),
    link="https://lmdeploy.readthedocs.io/",
)
TGI = Program(
    name="text-generation-inference",
    event="tgi-runs",
    path="text_generation_server/",
    options={
        "--gpu-memory-utilization": "--cuda-memory-fraction",
        "--max-model-len": "--max-total-tokens",
        "--max-num-batched-tokens": "--max-batch-prefill-tokens",
        "--max-num-seqs": "--max-batch-size",
        "--tensor-parallel-size": "--num-shard",
        "--quantization": "--quantize",
    },
    command="text-generation-launcher",
    same=frozenset({"--dtype", "--kv-cache-dtype", "--port", "--revision", "--trust-remote-code"}),
    link="https://huggingface.co/docs/text-generation-inference",
)
PROGRAMS = (SGLANG, TENSORRT_LLM, LMDEPLOY, TGI, COMFYUI, TRAINING, OLLAMA, LLAMA_CPP)

# Two of vLLM's backends that are one of the program's.
_TWICE = re.compile(r"(, )?\b(\w+) or \2\b")
# Beside an option, one that only some releases of vLLM have.
_OF_RELEASES = re.compile(
    r"(?<=`|\w)(?:,? (?:or|and)|,) `[^`]+`(?: or `?\w+`?)? \((?:before )?vLLM [\d.]+(?: and later)?\),?"
)
_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+[a-z]")
# What is in vLLM's environment, its releases, and the values that its options take.
_OF_THE_STACK = (
    r"\bVLLM_|\{(?:from|before) |vLLM \d|~/\.cache/vllm|\b(?:packages|serving)\.\w"
    r"|\b(?:TRITON|FLASH|TORCH)_(?:ATTN|MLA|SDPA)\b|a newer stack|another stack"
)
_OF_VLLM = re.compile(rf"{_OF_THE_STACK}|\bsparkinstall (?!diagnose\b|verify --level link\b)\w")
# The same, but for commands that help with any program.
_OF_VLLM_ALONE = re.compile(
    rf"{_OF_THE_STACK}|\bsparkinstall (?:plan|serve|recipes|ask|fit|models|stacks)\b|locked set"
)
# Options of vLLM that other launchers have too.
_OF_LAUNCHERS = frozenset({"--host", "--master-addr", "--master-port", "--nnodes", "--node-rank", "--port"})
# What only a program has that serves models.
_OF_A_SERVER = re.compile(rf"\bvLLM|(?i:\bbackend)|{OF_MODELS}")


def rewritten(told: Told, program: Program) -> Told:
    """Return what is told of a failure as it is true of another program than vLLM: with its name, and of the actions
    those that it knows."""
    links = tuple(each for each in told.links if "vllm" not in each) or (program.link,)
    return replace(_retold(told, program.name, _steps_of(program, told.hint)), links=links)


def for_any_program(hint: str) -> list[str]:
    """Return the steps of a hint that concern no program in particular."""
    return [each for each in without_vllm(hint) if not _OF_A_SERVER.search(each)]


def without_vllm(hint: str) -> list[str]:
    """Return the steps of a hint that need no vLLM."""
    told = (_OF_RELEASES.sub("", each) for each in steps(hint))
    known = advice.options_of_vllm() - _OF_LAUNCHERS
    return [each for each in told if not _OF_VLLM_ALONE.search(each) and known.isdisjoint(_FLAG.findall(each))]


def of_a_script(told: Told) -> Told:
    """Return what is told of a failure as it is true of a program that serves no models, whatever libraries it uses."""
    return _retold(told, "the program", without_vllm(told.hint) or [ELSEWHERE])


def _retold(told: Told, name: str, hints: Sequence[str]) -> Told:
    """Return what is told of a failure with these steps, and a program's name in place of vLLM's."""
    title, why, hint = (_named(each, name) for each in (told.title, told.why, "; ".join(hints)))
    return replace(told, title=title, why=why, hint=hint)


def _named(text: str, name: str) -> str:
    """Return a text with another name in place of vLLM's; "this vLLM" where it is no name: "this training"."""
    kind = name.removeprefix("the ")
    text = text if kind == name else re.sub(r"\b([Tt]his|[Aa]nother|[Oo]ld(?:er)?) vLLM(?![\w/-])", rf"\1 {kind}", text)
    text = re.sub(r"\b([Aa]) vLLM(?![\w/-])", r"\1 server", text)
    # What is told of a release of vLLM is of no other program.
    return re.sub(r"(?<![\w./-])vLLM(?! \d)(?![\w/-])", name, text)


def _steps_of(program: Program, hint: str) -> list[str]:
    """Return the steps of a hint that name nothing that only vLLM has; a newer release stands for the others."""
    told = [program.with_its_options(_OF_RELEASES.sub("", each)) for each in steps(hint)]
    known = [each for each in told if not _is_foreign(each, program)]
    return known if len(known) == len(told) else [*known, f"a newer release of {program.name}"]


def _is_foreign(step: str, program: Program) -> bool:
    return _OF_VLLM.search(step) is not None or not program.foreign.isdisjoint(_FLAG.findall(step))
