"""The time of `sparkinstall fit` on a large model, and of `recipes`, compared with starting and with reading by hand.

The model has 100 GB in 25 files of 16-bit weights with experts: real headers, and holes in place of the data, which
nobody reads.
"""

import shutil
from pathlib import Path

from benchmarks.environments import Environment
from benchmarks.timing import Command, Spread, in_turns
from tests.support.model_files import Shapes, size_of, write_model

TYPER, BY_HAND = "python -c 'import typer'", "by hand: `json.loads` of the same headers"
FIT, RECIPES = "sparkinstall fit FOLDER", "sparkinstall recipes"

_LAYERS, _EXPERTS, _HIDDEN, _INNER = 50, 128, 4096, 635
_FILES = 25
_CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": _HIDDEN, "head_dim": 128,
    "num_hidden_layers": _LAYERS, "num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": _EXPERTS,
    "num_experts_per_tok": 8, "max_position_embeddings": 32768, "torch_dtype": "bfloat16",
}  # fmt: skip
# What nobody can leave out: each header, and the sum of its offsets.
_SUM = """
import json, pathlib, sys
total = 0
for path in pathlib.Path(sys.argv[1]).glob("*.safetensors"):
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    total += sum(each["data_offsets"][1] - each["data_offsets"][0] for each in header.values() if "dtype" in each)
assert total > 9e10
"""


def measure(tool: Environment, work: Path, rounds: int) -> tuple[dict[str, Spread], int, int]:
    """Seconds by command, the bytes of the model, and how many tensors it has."""
    shards = list(_shards())
    folder = write_model(work / "large", _CONFIG, *shards)
    ours = tool.program("sparkinstall")
    fit = (ours, "fit", str(folder), "--context", "4096", "--memory", "121GiB", "--by-formula")
    try:
        found = in_turns(
            {
                TYPER: Command((tool.python, "-c", "import typer")),
                BY_HAND: Command((tool.python, "-c", _SUM, str(folder))),
                FIT: Command(fit),
                RECIPES: Command((ours, "recipes")),
            },
            rounds,
        )
    finally:
        shutil.rmtree(folder)
    return found, sum(map(size_of, shards)), sum(map(len, shards))


def _shards() -> list[Shapes]:
    """The tensors of each file: two layers."""
    per_file = _LAYERS // _FILES
    return [
        {name: ("BF16", shape) for layer in range(at * per_file, (at + 1) * per_file) for name, shape in _layer(layer)}
        for at in range(_FILES)
    ]


def _layer(number: int) -> list[tuple[str, tuple[int, int]]]:
    within = f"model.layers.{number}"
    experts = [
        (f"{within}.mlp.experts.{expert}.{name}.weight", shape)
        for expert in range(_EXPERTS)
        for name, shape in (
            ("gate_proj", (_INNER, _HIDDEN)),
            ("up_proj", (_INNER, _HIDDEN)),
            ("down_proj", (_HIDDEN, _INNER)),
        )
    ]
    attention = [(f"{within}.self_attn.{name}_proj.weight", (_HIDDEN, _HIDDEN)) for name in ("q", "o")]
    return experts + attention
