"""What a message tells by itself: its own words, and what in it one can act on."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from functools import lru_cache

from sparkinstall.facts import vllm_releases
from sparkinstall.facts.vllm_options import Declared
from sparkinstall.redaction import redact

NO_TEXT = "its text is missing"
"""What stands for the text of an exception of which only the class is known."""
_MOST = 3
"""Things of one kind that an advice names."""
_LONGEST = 300
"""Characters of a message that are repeated."""
_CLASS = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Failure|Exit|Unsupported)(?:: +|\(['\"])")
_INNER = re.compile(r"\bfailed with error ['\"](?P<error>.*?)['\"], please check")
_ERRNO = re.compile(r"\[Errno -?\d+\] ")

_LIST = r"(?P<{0}>\[[^\[\]]{{2,300}}\]|\{{[^{{}}]{{2,300}}\}}|\([^()]{{2,300}}\)|['\"`\w][^.;\n]{{1,160}})"
# Behind these such a word means the opposite: what follows is the value that was refused. "is not one of" keeps its
# sense.
_NOT = "".join(rf"(?<!{each} )" for each in ("no", "not", "n't", "never", "neither", "nor", "without", "not be"))
_NOT += "".join(rf"(?<!{word} {each} )" for word in ("not", "n't") for each in ("a", "an", "any", "in any", "yet"))
# The values that are taken instead.
_TAKEN = re.compile(
    r"(?i:(?:(?<!not be )(?<!cannot be )(?<!n't be )(?<!for )one of|choose from|input should be"
    rf"|(?<![a-z-]){_NOT}(?:valid|supported|available|allowed|possible|registered(?! for\b)|known|accepted|expected)"
    r"(?: [\w-]+){0,3}?(?: are| is| include|:| =|\s?\()|only supports?|options are)(?: the following)?:?) ?"
    + _LIST.format("list")
    + r"(?!\s+(?:by|for|with|when|if|yet)\b)"
)
# What a node has cannot be chosen: a list of GPUs is none of values.
_OF_GPUS = re.compile(r"(?i:\b(?:sm_?\d{2,3}|hopper|blackwell|ampere|turing|volta|ada lovelace|compute capabilit))")
_SEVERAL = re.compile(r"[,|]| or | and |['\"\[{(]")
_FLAG = re.compile(r"(?<![\w-])--(?!force-conf)[a-z][\w-]*[a-z0-9](?:[.][\w.-]+)?")
# How vLLM's command line says that it refuses something.
_VLLM_REFUSES = re.compile(r"\b(?:vllm(?: \w+)?|api_server\.py|serve): error: ")
# The command that has failed, which a message repeats whole: none of its words is wrong for that.
_REPEATED = re.compile(r"\b[Cc]ommand:? [\[('\"`].*[\])'\"`]+ (?=(?:returned|failed|died|timed out|exited)\b)")
_UNKNOWN = re.compile(r": unrecognized arguments: (?P<words>.+)")
_ARGUMENT = re.compile(r"nexpected keyword argument '(?P<name>\w+)'")
_VERB = re.compile(r"(?:vllm )?(?:serve|chat|complete|bench)\b")
_NO_MODEL = re.compile(r"arguments are required: model_tag")
_WRONG_VALUE = re.compile(r": argument (?P<option>--[\w-]+)\S*: invalid choice: ['\"]?(?P<value>[\w.-]+)")
_NO_VALUE = re.compile(r": argument (?P<option>--[\w-]+)\S*: ignored explicit argument")
_AMBIGUOUS = re.compile(r": ambiguous option: (?P<option>--[\w-]+)\S* could match")
_VALUE_MISSING = re.compile(r": argument (?P<option>--[\w-]+)\S*: expected (?:one|at least one|\d+) argument")
_OF_OPTIONS = re.compile("(?i:option|argument|flag|unknown|unrecogni|invalid|requires?|exclusive|conflict)")
_VARIABLE = re.compile(
    # Neither CUDA's errors nor the names of backends.
    r"(?<!=)\b(?!CUDA_ERROR_|CUDA_SUCCESS|CUDA_[RC]_\d|TORCH_(?:CHECK|SDPA)\b|(?:TRITON|FLASHINFER)_(?:ATTN|MLA|TRTLLM|CUTLASS|CUTEDSL|UNFUSED)(?:_|\b))"
    r"(?:VLLM|NCCL|CUDA|RAY|HF|TORCH|TRITON|FLASHINFER|PYTORCH|PYTHON|GLOO|UCX|OMP|TIKTOKEN|TRANSFORMERS|NVIDIA|LD)_[A-Z][A-Z0-9_]+\b"
)
_PROGRAMS = (
    r"sudo |pip3? |uv |python3? -m |apt(?:-get)? |docker |ray |hf |huggingface-cli |nvidia-\S+ |git |systemctl "
    r"|modprobe "
)
_COMMAND = re.compile(rf"[`'\"](?P<command>(?:{_PROGRAMS})[^`'\"\n]{{2,120}})[`'\"]")
_ADDRESS = re.compile(r"https?://(?!localhost|127\.|0\.0\.0\.0)[\w.-]+\.[a-z]{2,}[^\s'\"`<>)\]]*")
_PATH = re.compile(r"(?<![\w./:-])(?<!url: )/(?!usr/s?bin/|usr/lib|bin/|proc/self)(?:[\w.+@-]+/)+[\w.+@-]+")
_CODE = re.compile(r"\.(?:pyx?|pxi|cc?|cpp|cuh?|h|hpp|cu|so|go|rs|java|[cm]?[jt]s)\b|/(?:site|dist)-packages/")
# What vLLM calls a thing in words, and the option that sets it.
OPTIONS = (
    (r"tensor.?parallel|\btp(?:_| )?size|(?-i:\bTP\b)", "--tensor-parallel-size"),
    (r"pipeline.?parallel|\bpp(?:_| )size|(?-i:\bPP\b)", "--pipeline-parallel-size"),
    (r"data.?parallel|\bdp(?:_| )size", "--data-parallel-size"),
    (r"decode.context.parallel|(?-i:\bDCP\b)|\bdcp_\w+", "--decode-context-parallel-size"),
    (r"expert.?parallel", "--enable-expert-parallel"),
    (r"\bEPLB\b|\beplb", "--enable-eplb"),
    (r"speculative|spec(?:ulative)?.decod|\bdraft(?:er|ing)?\b|(?-i:\bMTP\b)|(?-i:\bEAGLE)", "--speculative-config"),
    (r"\bLoRA\b|\blora_", "--enable-lora"),
    (r"prefix.?cach", "--enable-prefix-caching"),
    (r"chunked.?prefill", "--enable-chunked-prefill"),
    (r"cuda.?graphs?\b|cudagraph", "--enforce-eager"),
    (r"kv.?cache.?dtype|fp8.kv.?cache|quantized kv", "--kv-cache-dtype"),
    (r"attention.?backend|attn.?backend", "--attention-backend"),
    (r"moe.?backend", "--moe-backend"),
    (r"mamba (?:ssu )?backend", "--mamba-backend"),
    (r"load.?format", "--load-format"),
    (r"\b(?:b?float16|float32)\b", "--dtype"),
    (r"sliding.?window", "--disable-sliding-window"),
    (r"async(?:hronous)?.scheduling", "--async-scheduling"),
    (r"hybrid kv cache", "--disable-hybrid-kv-cache-manager"),
    (r"kv.?connector|kv.?transfer|\bnixl\b|\bmooncake\b|\blmcache\b", "--kv-transfer-config"),
    (r"tool.?(?:call.)?parser", "--tool-call-parser"),
    (r"reasoning.parser", "--reasoning-parser"),
    (r"structured.output|guided.decoding|\bgrammars?\b", "--structured-outputs-config"),
    (r"logits?.?process", "--logits-processors"),
    (r"\bquanti[sz]ation\b|quant_method|quant_algo", "--quantization"),
    (r"chat.template", "--chat-template"),
    (r"\bmulti.?modal\b", "--limit-mm-per-prompt"),
    (r"\bmamba\w* ?cache|mamba.?block", "--mamba-block-size"),
    (r"\bblock.?size\b", "--block-size"),
    (r"\bpool(?:ing|er)\b", "--runner"),
)
"""Words of vLLM's messages, and the option that they are about."""
FORMER = {
    "--calculate-kv-scales": "",
    "--chat-template-text-format": "--chat-template-content-format",
    "--cuda-graph-sizes": "--cudagraph-capture-sizes",
    "--disable-log-requests": "--no-enable-log-requests",
    "--disable-mm-preprocessor-cache": "--mm-processor-cache-gb 0",
    "--enable-reasoning": "--reasoning-parser NAME alone",
    "--guided-decoding": "--structured-outputs-config",
    "--guided-decoding-backend": "--structured-outputs-config",
    "--max-seq-len-to-capture": "--max-cudagraph-capture-size",
    "--num-scheduler-steps": "",
    "--num-speculative-tokens": "--speculative-config",
    "--preemption-mode": "",
    "--rope-scaling": "--hf-overrides",
    "--rope-theta": "--hf-overrides",
    "--speculative-draft-tensor-parallel-size": "--speculative-config",
    "--speculative-model": "--speculative-config",
    "--swap-space": "",
    "--task": "--runner or --convert",
    "--use-v2-block-manager": "",
    "--worker-use-ray": "--distributed-executor-backend ray",
    # of LoRA as other programs have it, of SGLang and of llama.cpp
    "--lora-path": "--lora-modules NAME=PATH",
    "--lora-paths": "--lora-modules NAME=PATH",
    "--context-length": "--max-model-len",
    "--ctx-size": "--max-model-len",
    "--max-running-requests": "--max-num-seqs",
    "--mem-fraction-static": "--gpu-memory-utilization",
    "--model-path": "the model as the first word after vllm serve",
    "--n-gpu-layers": "",
    "--tp": "--tensor-parallel-size",
    "--tp-size": "--tensor-parallel-size",
}
"""Options that vLLM had, or that other servers have, and what they are now; "": nothing, they are not needed."""
_OPTIONS = tuple((re.compile(f"(?i:{words})"), option) for words, option in OPTIONS)


def says(message: str) -> str:
    """Return what a message says, in one line: without secrets, without the class of the exception, and of one that
    repeats another process's, what that one says."""
    words = " ".join(redact(message).split())
    words = inner["error"] if (inner := _INNER.search(words)) else words
    found = _CLASS.match(words)
    is_told = found and found.end() < len(words) and not words.endswith(NO_TEXT)
    words = words[found.end() :] if found and is_told else words
    is_quoted = found is not None and found[0].endswith(("('", '("'))
    words = _ERRNO.sub("", words)
    words = (words.rstrip("'\")") if is_quoted else words).rstrip(" .;:") or words
    return words if len(words) <= _LONGEST else f"{words[:_LONGEST]} ..."


def advice(message: str, is_of_vllm: bool) -> tuple[str, ...]:
    """Return what to do that follows from the words of a message: one sentence for each thing that it names."""
    message = _REPEATED.sub(" ", message)
    found = [*_of_the_command_line(message), *_of_a_call(message)]
    if values := _values(message):
        found.append(f"use one of those that it takes: {values}")
    if named := _some(match["command"] for match in _COMMAND.finditer(message)):
        found.append(f"run what it names: {named}")
    options = _some([*_flags(message, is_of_vllm), *(_options(message) if is_of_vllm else ())])
    if options and not (found and _VLLM_REFUSES.search(message)):
        found.append(f"change, add or leave out what it is about: {options}")
    if variables := _some(_VARIABLE.findall(message)):
        found.append(f"look at the variable that it names: {variables}")
    if paths := _some(each for each in _PATH.findall(message) if not _CODE.search(each)):
        found.append(f"look at what it names: {paths}")
    if addresses := _some(each.rstrip(".,:") for each in _ADDRESS.findall(message)):
        found.append(f"it names {addresses}")
    return tuple(found)


def _of_the_command_line(message: str) -> Iterator[str]:
    """Yield what to do about a command line that vLLM refuses: which releases have an option, or what stands wrong."""
    if not _VLLM_REFUSES.search(message):
        return
    if found := _UNKNOWN.search(message):
        yield from _of_unknown_words(found["words"])
    elif _NO_MODEL.search(message):
        yield "name the model as the first word after `vllm serve` (a name of the hub or a folder), before all options"
    elif found := _WRONG_VALUE.search(message):
        having = [each.release for each in shipped_with(found["option"], found["value"])]
        if having:
            yield f"`{found['value']}` is a value of `{found['option']}` in vLLM {_releases(having)}"
    elif found := _NO_VALUE.search(message):
        yield f"`{found['option']}` takes no value: give it alone, or `--no-{found['option'][2:]}` for the opposite"
    elif found := _AMBIGUOUS.search(message):
        is_model = found["option"] == "--model"
        yield (
            "give the model as the first word after `vllm serve`, without `--model`"
            if is_model
            else (f"write the whole name of the option: `{found['option']}` is the beginning of several")
        )
    elif found := _VALUE_MISSING.search(message):
        yield (
            f"give the value of `{found['option']}` right behind it: a variable of the shell that is empty, or a line "
            "that ends before its value, leaves none"
        )


def _of_unknown_words(words: str) -> Iterator[str]:
    """Yield what to do about words that are no options, or none of this vLLM."""
    flags = [flag.split(".")[0].replace("_", "-") for flag in dict.fromkeys(_FLAG.findall(words))]
    if _VERB.match(words):
        yield (
            "the image or script already runs `vllm serve`, so that the word stands there twice: after the name of the "
            "image give the model and the options alone, or set `--entrypoint vllm`"
        )
        return
    yield from _known_to(flags)
    if not flags:
        yield (
            "these words belong to no option: the model's name comes first and once, a value with blanks or braces "
            "needs quotes, and a line of the command that goes on needs its `\\` at the very end"
        )


def _of_a_call(message: str) -> Iterator[str]:
    """Yield what became of an argument that Python code gives vLLM, where it was an option."""
    if (found := _ARGUMENT.search(message)) and (now := FORMER.get(f"--{found['name'].replace('_', '-')}")):
        yield f"`{found['name']}` is now what the option `{now}` is, in Python's spelling"


def _known_to(flags: Iterable[str]) -> Iterator[str]:
    """Yield which releases have these options, or the nearest one that they have."""
    releases = [each.release for each in vllm_releases.shipped()]
    alike = defaultdict[tuple[str, ...], list[str]](list)
    for flag in flags:
        if flag in FORMER and not shipped_with(flag):
            its = FORMER[flag]
            what = f"it is now `{its}`" if its else "nothing takes its place"
            yield f"no vLLM from {releases[0]} to {releases[-1]} has `{flag}`, leave it out: {what}"
            continue
        alike[tuple(each.release for each in shipped_with(flag))].append(flag)
    for having, those in alike.items():
        names = " and ".join(f"`{each}`" for each in those[:_MOST])
        if len(having) == len(releases):
            yield (
                f"vLLM {releases[0]} to {releases[-1]} have {names}: either option and value came as one word (an "
                "entry of a list in a compose file, in Kubernetes or in `subprocess`): two entries, or "
                "`--option=value`; or this one is older, or another program"
            )
        elif having:
            yield f"only vLLM {_releases(having)} {'have' if having[1:] else 'has'} {names}: leave it out otherwise"
        else:
            near = {each: _nearest(each) for each in those[:_MOST]}
            told = " and ".join(
                f"`{each}`" + (f" (the nearest is `{near[each]}`)" if near[each] else "") for each in near
            )
            yield (
                f"no vLLM from {releases[0]} to {releases[-1]} has {told}: leave it out, correct its name, or install "
                "the extension (such as vllm-omni) that adds it, of the same release"
            )


def _nearest(flag: str) -> str:
    """Return the option that is written most alike; of those with the same first word a less similar one too."""
    options = vllm_releases.shipped()[-1].options
    first = f"{flag[2:].split('-')[0]}-"
    same = [each for each in options if each[2:].startswith(first)]
    alike = get_close_matches(flag, options, n=1, cutoff=0.75) or get_close_matches(flag, same, n=1, cutoff=0.6)
    return next(iter(alike), "")


def shipped_with(option: str, value: str = "") -> list[Declared]:
    """Return the releases of the shipped stacks that have an option, or this value of it."""
    known = {option, f"--{option.removeprefix('--no-')}"}
    return [
        each
        for each in vllm_releases.shipped()
        if any(name in each.options and (not value or value in each.options[name].choices) for name in known)
    ]


def _releases(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _flags(message: str, is_of_vllm: bool) -> list[str]:
    """Return the options that a message names, not those of a command that it repeats."""
    flags = _FLAG.findall(message)
    return flags if len(flags) <= _MOST and (is_of_vllm or _OF_OPTIONS.search(message)) else []


def _values(message: str) -> str:
    for found in _TAKEN.finditer(message):
        values = found["list"].split(" [type=")[0].strip().rstrip(".,;").removesuffix(" now")
        values = values if "(" in values else values.rstrip(")")
        is_amount = re.match(r"\(?\d[\d.,]* (?:tokens|bytes|[KMG]i?B)\b", values) is not None
        is_other = is_amount or _OF_GPUS.search(values) or _CODE.search(values)
        if _SEVERAL.search(values) and len(values) > 3 and not is_other:
            return values
    return ""


def _options(message: str) -> list[str]:
    """Return vLLM's options that a message speaks of, by their own names first."""
    normal = re.sub("[_-]", " ", message.lower())
    own = [(normal.find(name), option) for name, option in _names().items() if re.search(rf"\b{name}\b", normal)]
    longest = [option for _, option in sorted(own) if not any(option != each and option[2:] in each for _, each in own)]
    return longest or [option for words, option in _OPTIONS if words.search(message)]


@lru_cache(maxsize=1)
def options_of_vllm() -> frozenset[str]:
    """Return every option of vLLM of the shipped stacks."""
    return frozenset(option for each in vllm_releases.shipped() for option in each.options)


@lru_cache(maxsize=1)
def _names() -> dict[str, str]:
    """Return vLLM's options by their names with spaces; those of one word are words of the language too."""
    options = sorted(option for option in options_of_vllm() if "-" in option[2:])
    return {option[2:].replace("-", " "): option for option in options}


def _some(those: Iterable[str]) -> str:
    different = list(dict.fromkeys(those))[:_MOST]
    return " and ".join(f"`{each}`" for each in different)
