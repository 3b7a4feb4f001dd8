"""A node's environment for /opt/sparkinstall/venv with vLLM built for the CPU, and two tiny models."""

import json
import platform
import random
import re
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from math import prod
from operator import add
from pathlib import Path

from uv import find_uv_bin

from tests.lab import cache, commands
from tests.support.bytecode import PYTHON, compile_modules

PLACE = "/opt/sparkinstall/venv"
VERSION = "0.18.1"
SECONDS = 1500
REQUIREMENTS = Path(__file__).with_name("vllm-on-cpu.txt")
SITE = f"lib/python{PYTHON}/site-packages"
# vLLM's CPU workers require these two. The first is part of the node's Debian.
PRELOADED = ("/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4", f"{PLACE}/{SITE}/lib/libiomp5.so")
# For the unit of a Spark, which serves here too: what a CPU needs and a Spark does not.
VARIABLES = f"""\
LD_PRELOAD={":".join(PRELOADED)}
VLLM_CPU_KVCACHE_SPACE=1
VLLM_CPU_OMP_THREADS_BIND=nobind
OMP_NUM_THREADS=1
# Without PyTorch's compilation, which needs a compiler that the lab's nodes do not have.
TORCHDYNAMO_DISABLE=1
VLLM_NO_USAGE_STATS=1
"""
DROP_IN = "[Service]\n" + re.sub("^(?=[A-Z])", "Environment=", VARIABLES, flags=re.MULTILINE)
# The index has PyTorch for x86_64 only with CUDA, whose libraries must exist to be loaded. These 1.4 GB are needed only
# with a GPU.
ONLY_FOR_A_GPU = (
    *("nvidia/cudnn/lib/libcudnn_*", "nvidia/cuda_cupti/lib/libnvperf_*", "nvidia/nvshmem/lib/libnvshmem_device.*"),
    *("torch/lib/libtorch_cuda_linalg.so", "torch/include", "torch/test", "lib/*.a", "lib/*.dbg", "bin"),
)

# Guarded: the processes that vLLM spawns import it too.
_VLLM = f"#!{PLACE}/bin/python\nfrom vllm.entrypoints.cli.main import main\n\nif __name__ == '__main__':\n    main()\n"
_ACTIVATE = f'PATH="{PLACE}/bin:$PATH"\nexport PATH\n'

# Workers on CPUs with the same value of this are taken for processes of one machine that share its memory.
_ONE_MACHINE = 'instance_identifier = os.environ["VLLM_DIST_IDENT"]\n'
_THIS_NODE = _ONE_MACHINE.replace("\n", " + os.uname().nodename\n")


def environment() -> Path:
    """The folder to bind to `PLACE`: 5.6 GB; 2.5 GB are downloaded the first time."""
    recipe = (REQUIREMENTS.read_text(), PYTHON, "compiled", _VLLM, _ACTIVATE, _THIS_NODE, *ONLY_FOR_A_GPU)
    return cache.kept("vllm-on-cpu", recipe, _build)


def _build(tree: Path) -> None:
    site, programs = tree / SITE, tree / "bin"
    programs.mkdir()
    _install(site)
    for pattern in ONLY_FOR_A_GPU:
        for each in site.glob(pattern):
            shutil.rmtree(each) if each.is_dir() else each.unlink()
    _separate_nodes(site / "vllm/distributed/device_communicators/cpu_communicator.py")
    # vLLM reads its build's target from here.
    named = site / f"vllm-{VERSION}+cpu.dist-info"
    named.mkdir()
    (named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n")
    (tree / "pyvenv.cfg").write_text(f"home = /usr/bin\nversion = {PYTHON}\n")
    (tree / "sparkinstall.json").write_text("{}\n")
    for name in ("python", "python3"):
        (programs / name).symlink_to("/usr/bin/python3")
    (programs / "activate").write_text(_ACTIVATE)
    (programs / "vllm").write_text(_VLLM)
    (programs / "vllm").chmod(0o755)
    compile_modules(tree, PLACE)


def search_library() -> Path:
    """What `diagnose` needs, for the Python of the nodes: a folder for PYTHONPATH."""
    lock = REQUIREMENTS.parents[2].joinpath("requirements.lock").read_text()
    (pin,) = re.findall(r"^ahocorasick-rs==\S+", lock, re.MULTILINE)
    return cache.kept("ahocorasick", (pin, PYTHON), lambda tree: fetch(tree, pin))


def _separate_nodes(file: Path) -> None:
    """Make the workers of two nodes use the cable, as with GPUs, and not shared memory."""
    before, found, after = file.read_text().partition(_ONE_MACHINE)
    assert found, f"{file.name} differs from that of vLLM {VERSION}"
    file.write_text(before + _THIS_NODE + after)


def _install(site: Path) -> None:
    fetch(site, "-r", str(REQUIREMENTS))


def fetch(site: Path, *wanted: str) -> None:
    """Install packages for the Python of the nodes, without what they need."""
    uv = find_uv_bin()
    built_for = ("--python-version", PYTHON, "--python-platform", f"{platform.machine()}-manylinux_2_39")
    # Without uv's cache, which would keep a second copy of everything.
    quiet = ("--quiet", "--no-progress", "--no-cache", "--no-deps")
    commands.run(
        *(uv, "pip", "install", *quiet, "--target", str(site), *built_for, *wanted),
        timeout=SECONDS,
    )


# A Qwen2 of 0.36 million parameters. Two nodes share its heads; vLLM's CPU kernels support heads of 32.
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD = 128, 256, 2, 4, 2, 32
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 512
CONTEXT = 1024
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# A chat template that opens the reasoning itself, as Qwen3.5's does: with reasoning that never ends.
_OPENING_CHAT = _CHAT.replace("assistant\n", "assistant\n<think>~")
REASONING_TAGS = ("<think>", "</think>")
# The output of the reasoning model; each character has only one successor.
REASONING, ANSWER, ENDLESS = "hm, six", "42", "~abc~"
Weights = Iterable[tuple[str, tuple[int, ...], Sequence[float]]]


def model(folder: Path) -> Path:
    """Write the model to `folder`: the same random weights each time, one token a byte, a chat template."""
    return _write(folder, SPECIAL, tied=True, weights=_random())


def reasoning_model(folder: Path) -> Path:
    """A model whose next token depends only on the last: it answers `<think>hm, six</think>42` to any prompt.

    With the chat template `opening.jinja` it never reaches an answer.
    """
    names = {name: 256 + place for place, name in enumerate((*SPECIAL, *REASONING_TAGS))}
    answer = ("\n", "<think>", *REASONING, "</think>", *ANSWER, "<|im_end|>")
    chains = [[names.get(each) or ord(each) for each in text] for text in (answer, ENDLESS)]
    follows = {one: following for chain in chains for one, following in pairwise(chain)}
    _write(folder, (*SPECIAL, *REASONING_TAGS), tied=False, weights=_chained(follows))
    (folder / "opening.jinja").write_text(_OPENING_CHAT)
    return folder


def _write(folder: Path, added: Sequence[str], *, tied: bool, weights: Weights) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [*_bytes_as_characters(), *added]
    for name, content in {
        "config.json": {**_config(), "tie_word_embeddings": tied},
        "generation_config.json": {"eos_token_id": tokens.index("<|im_end|>")},
        "tokenizer.json": _tokenizer(tokens, added),
        "tokenizer_config.json": _tokenizer_config(),
    }.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "model.safetensors").write_bytes(b"".join(_safetensors(weights)))
    return folder


def _config() -> dict[str, object]:
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    rest = {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT}
    kind = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "dtype": "bfloat16"}
    return {**kind, **sizes, **heads, **rest, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}


def _bytes_as_characters() -> list[str]:
    """A printable character for each byte, as in GPT-2's byte-level BPE."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(each) if each in plain else chr(next(others)) for each in range(256)]


def _tokenizer(tokens: list[str], added: Sequence[str]) -> dict[str, object]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": tokens.index(each), "content": each, "special": each in SPECIAL, **flags} for each in added
        ],
        "pre_tokenizer": by_bytes,
        "decoder": by_bytes,
        "model": {"type": "BPE", "vocab": {token: number for number, token in enumerate(tokens)}, "merges": []},
    }


def _tokenizer_config() -> dict[str, object]:
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **ends,
        "model_max_length": CONTEXT,
        "chat_template": _CHAT,
    }


def _shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        within = f"model.layers.{layer}"
        for name, wide in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            yield f"{within}.self_attn.{name}_proj.weight", (wide * HEAD, HIDDEN)
            yield f"{within}.self_attn.{name}_proj.bias", (wide * HEAD,)
        yield f"{within}.self_attn.o_proj.weight", (HIDDEN, HEADS * HEAD)
        yield f"{within}.mlp.gate_proj.weight", (INTERMEDIATE, HIDDEN)
        yield f"{within}.mlp.up_proj.weight", (INTERMEDIATE, HIDDEN)
        yield f"{within}.mlp.down_proj.weight", (HIDDEN, INTERMEDIATE)
        yield f"{within}.input_layernorm.weight", (HIDDEN,)
        yield f"{within}.post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)


def _random() -> Weights:
    drawn = random.Random(0)
    for name, shape in _shapes():
        yield name, shape, [1.0 if "norm" in name else drawn.gauss(0, 0.1) for _ in range(prod(shape))]


def _chained(follows: Mapping[int, int]) -> Weights:
    """Layers that add nothing, and a head in which a token's row is the embedding of its predecessor."""
    head = [0.0] * VOCABULARY * HIDDEN
    for name, shape, values in _random():
        if name == "model.embed_tokens.weight":
            for one, following in follows.items():
                row = slice(following * HIDDEN, (following + 1) * HIDDEN)
                head[row] = map(add, head[row], values[one * HIDDEN : (one + 1) * HIDDEN])
        silent = name.endswith(("o_proj.weight", "down_proj.weight"))
        yield name, shape, [0.0] * len(values) if silent else values
    yield "lm_head.weight", (VOCABULARY, HIDDEN), head


def _safetensors(weights: Weights) -> Iterable[bytes]:
    """The format of safetensors: the header's length, the header, and the numbers in order."""
    header, numbers = {}, bytearray()
    for name, shape, values in weights:
        began = len(numbers)
        # A bfloat16 is the upper half of a float.
        numbers += b"".join(struct.pack("<f", value)[2:] for value in values)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [began, len(numbers)]}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)), text, bytes(numbers)
